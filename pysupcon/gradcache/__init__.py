"""GradCache: a large contrastive batch through an encoder in chunks."""

from pysupcon.gradcache.cache import GradCache

__all__ = ["GradCache"]
