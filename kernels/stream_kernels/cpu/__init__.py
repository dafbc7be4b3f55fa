"""The C++ operators for the CPU, compiled at first use, and the functions that call them."""

from stream_kernels.cpu.block_attention import cpu_block_attention_backward, cpu_block_attention_forward
from stream_kernels.cpu.library import cpu_available
from stream_kernels.cpu.select_blocks import cpu_select_blocks

__all__ = ["cpu_available", "cpu_block_attention_backward", "cpu_block_attention_forward", "cpu_select_blocks"]
