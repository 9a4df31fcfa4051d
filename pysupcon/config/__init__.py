"""The config of a training: its fields, YAML files, the command line."""

from pysupcon.config.command_line import config_of, parse_args
from pysupcon.config.composed import compose
from pysupcon.config.fields import Config
from pysupcon.config.stored import load_config, to_yaml

__all__ = ["Config", "compose", "config_of", "load_config", "parse_args", "to_yaml"]
