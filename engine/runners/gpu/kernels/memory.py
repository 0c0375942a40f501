"""Memory by its address: what more than one kernel uses."""

import triton
import triton.language as tl


@triton.jit
def address_of(TABLE, NUMBER: tl.constexpr):
    """The pointer to numbers at an address that TABLE points to. Buffers of torch are aligned to 16 bytes."""
    address = tl.multiple_of(tl.load(TABLE), 16)
    return tl.multiple_of(address.to(tl.pointer_type(NUMBER)), 16)
