"""What a large batch costs: named ranges in the product's code, traces of chosen steps, and the command
``python -m pysupcon profile``, which predicts and then measures time and peak memory."""
