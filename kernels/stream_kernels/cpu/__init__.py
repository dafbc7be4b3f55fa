"""The CPU operator: C++ compiled at first use, and the functions that call it."""

from stream_kernels.cpu.block_attention import (
    cpu_available,
    cpu_block_attention_backward,
    cpu_block_attention_forward,
)

__all__ = ["cpu_available", "cpu_block_attention_backward", "cpu_block_attention_forward"]
