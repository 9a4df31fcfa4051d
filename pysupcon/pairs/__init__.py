"""From embeddings to statistics per anchor: checks, operators, their derivatives, several processes."""
