"""Activations cross a process as bytes."""

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import pack, unpack

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


@st.composite
def activations(draw):
    """Draw any bits, NaNs among them, in any layout."""
    dtype = draw(DTYPES)
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    num_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    tensor = torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.transpose(0, 1) if draw(st.booleans()) else tensor


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@given(activations())
def test_a_tensor_is_the_same_bits_after_its_journey(tensor):
    arrived = unpack(pickle.loads(pickle.dumps(pack(tensor))), device="cpu")
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(bits(arrived), bits(tensor))


@given(activations())
def test_what_arrived_is_in_memory_of_its_own(tensor):
    packed = pack(tensor)
    packed.buffer.flags.writeable = False  # as the object store gives it
    unpack(packed, device="cpu").zero_()
    assert torch.equal(bits(unpack(packed, device="cpu")), bits(tensor))
