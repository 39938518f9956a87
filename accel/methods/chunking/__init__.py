"""Dynamic chunking: few tokens where the picture is predictable, many where it is not."""

from .config import DynamicChunkingConfig as DynamicChunkingConfig
