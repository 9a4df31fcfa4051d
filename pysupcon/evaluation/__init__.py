"""Evaluation of a finished run: features of its frozen encoder, evaluators, report and pictures."""
