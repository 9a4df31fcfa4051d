"""``python -m pysupcon COMMAND``: one module a command, each with ``main(arguments) -> status``."""
