"""Cost of a large batch: ``pysupcon profile`` predicts and measures time and peak memory; traces of training
steps."""
