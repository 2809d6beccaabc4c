"""The compressed exchange: what a message holds, what it costs, what rounding does to the sum of many."""

import json
import math
import pickle
import random
import zlib
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import safetensors.torch
import torch

from qlora_dist.aggregate import exchange
from qlora_dist.aggregate.changes import Tensors
from qlora_dist.aggregate.exchange import BLOCK, Encoder, Header, Message, decode, encode

HEADER = Header("change", "island-1", round=3, lease=7, tokens=12_345, base="ab" * 32)
ALL_BITS = (4, 8, 16, 32)
# What SmolLM2-135M has at rank 8: 30 layers, 7 projections.
SHAPES = {"q_proj": (576, 576), "k_proj": (192, 576), "gate_proj": (1536, 576), "down_proj": (576, 1536)}


def adapter(layers: int = 2, rank: int = 8, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for layer in range(layers):
        for name, (outputs, inputs) in SHAPES.items():
            place = f"base_model.model.model.layers.{layer}.mlp.{name}"
            shapes |= {f"{place}.lora_A.weight": (rank, inputs), f"{place}.lora_B.weight": (outputs, rank)}
    # Layers differ in size by orders of magnitude, as real changes do.
    return {n: 10 ** (-i % 4) * 1e-4 * torch.randn(s, generator=generator) for i, (n, s) in enumerate(shapes.items())}


def odd() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    shapes = {"scalar": (), "empty": (0, 5), "one": (1,), "odd": (3, 43), "block": (128,), "whole": (2, 256)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def through(tensors: Tensors, bits: int) -> Message:
    data = encode(tensors, HEADER, bits)
    message = decode(data)
    assert sum(message.sizes) == len(data)
    return message


@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_message_comes_back_with_its_header_names_shapes_and_dtypes(bits: int) -> None:
    tensors = {**odd(), "half": torch.randn(7, 9).bfloat16()}
    message = through(tensors, bits)
    assert (message.header, message.bits) == (HEADER, bits)
    assert {n: (t.shape, t.dtype) for n, t in message.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_in_pieces_is_what_it_is_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU holds one piece at a time, of an adapter whose tensors are larger."""
    tensors = {**adapter(), **odd()}
    tensors["whole"][1, 3] = math.nan
    at_once = encode(tensors, HEADER, bits)
    largest = []
    for name in ("quantize_blockwise", "quantize_4bit"):
        quantise = getattr(bnb, name)

        def counting(piece: torch.Tensor, quantise: Any = quantise, **settings: Any) -> Any:
            largest.append(piece.numel())
            return quantise(piece, **settings)

        monkeypatch.setattr(bnb, name, counting)
    monkeypatch.setattr(exchange, "PIECE", 256)
    assert encode(tensors, HEADER, bits, torch.device("cpu")) == at_once
    assert max(largest) == 256


def test_32_bits_are_exact_and_16_are_bf16() -> None:
    for name, tensor in odd().items():
        assert torch.equal(through(odd(), 32).tensors[name], tensor)
        assert torch.equal(through(odd(), 16).tensors[name], tensor.bfloat16().float())


@pytest.mark.parametrize(("bits", "error"), [(8, 0.012), (4, 0.11)])
def test_quantised_values_are_those_of_bitsandbytes(bits: int, error: float) -> None:
    sent = {**adapter(), **odd()}
    for name, tensor in through(sent, bits).tensors.items():
        original = sent[name].flatten()
        if not len(original) or len(original) % 2:  # bitsandbytes compiles a kernel for these, for seconds
            continue
        if bits == 8:
            expected = bnb.dequantize_blockwise(*bnb.quantize_blockwise(original, blocksize=BLOCK[8]))
        else:
            expected = bnb.dequantize_4bit(*bnb.quantize_4bit(original, blocksize=BLOCK[4], quant_type="nf4"))
        # Our scales are bf16: 2**-9 of each value.
        torch.testing.assert_close(tensor.flatten(), expected.flatten(), rtol=2**-8, atol=0)
        assert float((tensor.flatten() - original).norm() / original.norm()) < error
    torch.testing.assert_close(through(sent, bits).tensors["one"], sent["one"], rtol=2**-8, atol=0)


def test_what_a_message_costs_is_known_to_the_byte() -> None:
    tensors = adapter(layers=30)
    elements = sum(tensor.numel() for tensor in tensors.values())
    per_element = {bits: len(encode(tensors, HEADER, bits)) / elements for bits in ALL_BITS}
    for bits, expected in ((32, 4.0), (16, 2.0), (8, 1 + 2 / 256), (4, 0.5 + 2 / 128)):
        message = through(tensors, bits)
        assert message.sizes.values + message.sizes.scales == elements * expected
        assert message.sizes.header < 3000, "240 names, and safetensors' own header"
        assert per_element[bits] == pytest.approx(expected, rel=0.005)
    # Against the fp32 and the bf16 that gradients are summed in.
    assert (per_element[32] / per_element[4], per_element[16] / per_element[4]) > (7.7, 3.85)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_arrive_as_such(bits: int, bad: float) -> None:
    tensors = adapter()
    first, second, *_ = tensors
    tensors[first][3, 100] = bad
    message = through(tensors, bits)
    assert not bool(message.tensors[first].isfinite().all())
    assert bool(message.tensors[second].isfinite().all())


def test_error_feedback_makes_the_sum_of_messages_the_sum_of_changes() -> None:
    """A small part of a change beside a large one rounds to nothing each time, unless what was left out is kept."""
    generator = torch.Generator().manual_seed(0)
    change = torch.cat([torch.full((64,), 1.0), torch.full((64,), 0.03)])
    for bits, most in ((4, 0.02), (8, 0.001)):
        with_feedback, kept, lost, true = Encoder(bits), *torch.zeros(3, 128)
        errors = {}
        for message in range(1, 201):
            this = change * (1 + 0.1 * torch.randn(128, generator=generator))
            true += this
            kept += with_feedback.encode({"w": this}, HEADER)[1]["w"]
            lost += decode(encode({"w": this}, HEADER, bits)).tensors["w"]
            small = slice(64, 128)
            errors[message] = [float((total - true)[small].norm() / true[small].norm()) for total in (kept, lost)]
            torch.testing.assert_close(true - kept, with_feedback.residual["w"], rtol=0, atol=1e-3)
        assert errors[200][0] < most
        assert errors[200][0] < errors[10][0] / 5, "it falls with the number of messages"
        if bits == 4:
            assert errors[200][1] > 0.9, "without it the small part never arrives"
        else:
            assert errors[200][1] > 4 * errors[200][0]


def test_the_residual_is_saved_and_goes_on_bit_for_bit() -> None:
    encoder = Encoder(4)
    for seed in range(3):
        encoder.encode(adapter(seed=seed), HEADER)
    saved = safetensors.torch.save(encoder.state_dict())
    expected = encoder.encode(adapter(seed=9), HEADER)[0]
    again = Encoder(4)
    again.load_state_dict(safetensors.torch.load(saved))
    assert again.encode(adapter(seed=9), HEADER)[0] == expected
    assert Encoder(4).encode(adapter(seed=9), HEADER)[0] != expected


def test_a_bad_change_leaves_nothing_behind_and_names_can_be_forgotten() -> None:
    encoder = Encoder(8)
    encoder.encode(adapter(), HEADER)
    before = dict(encoder.residual)
    bad = adapter()
    first, second, *_ = bad
    bad[first][0, 0] = float("nan")
    encoder.encode(bad, HEADER)
    assert all(encoder.residual[name] is before[name] for name in before)
    encoder.forget([first])
    assert first not in encoder.residual
    assert second in encoder.residual
    encoder.encode(adapter(), HEADER)
    assert Encoder(32).encode(adapter(), HEADER)[1].keys() == adapter().keys()


def test_islands_that_apply_the_same_messages_hold_the_same_adapter_near_the_true_one() -> None:
    """From the coordinator to the islands: it keeps the exact adapter, they the sum of its messages."""
    exact, encoder = adapter(), Encoder(4)
    islands = [dict(exact) for _ in range(2)]
    for round in range(1, 30):
        update = adapter(seed=round)
        exact = {name: exact[name] + update[name] for name in exact}
        data = encoder.encode(update, HEADER)[0]
        islands = [{name: island[name] + tensor for name, tensor in decode(data).tensors.items()} for island in islands]
    for name in exact:
        assert torch.equal(islands[0][name], islands[1][name])
        # One message's rounding, not 29.
        torch.testing.assert_close(exact[name] - islands[0][name], encoder.residual[name], rtol=0, atol=1e-6)


def test_what_is_no_message_is_refused_in_words() -> None:
    good = encode(adapter(), HEADER, 4)

    def with_header(spaces: int = 0, **changed: object) -> bytes:
        parts = safetensors.torch.load(good)
        text = json.loads(zlib.decompress(parts["header"].numpy().tobytes())) | changed
        packed = zlib.compress(json.dumps(text).encode() + b" " * spaces)
        return safetensors.torch.save({**parts, "header": torch.frombuffer(bytearray(packed), dtype=torch.uint8)})

    assert decode(with_header(spaces=100)).header == HEADER
    layout = [["w", [8, 16], "float32"]]
    wrong = [
        b"", good[:-1], good[: len(good) // 2], good + b"x", pickle.dumps({"w": 1}),
        safetensors.torch.save({"w": torch.zeros(3)}), with_header(spaces=1 << 25),
        *(with_header(**change) for change in (
            {"format": 2}, {"bits": 5}, {"bits": 8}, {"bits": "4"}, {"tokens": -1}, {"round": 1.5}, {"round": True},
            {"island": 7}, {"kind": "x"}, {"layout": layout}, {"layout": [["w", [10**9, 10**9], "float32"]]},
            {"layout": [["w", [-8, -16], "float32"]]}, {"layout": [["w", [8], "int64"]]}, {"extra": 1}, {"layout": 3},
        )),
    ]  # fmt: skip
    for data in wrong:
        with pytest.raises(ValueError, match="no whole message"):
            decode(data)


def test_bytes_that_were_changed_on_the_way_raise_nothing_else() -> None:
    draw = random.Random(0)
    good = encode(odd(), HEADER, 8)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert isinstance(decode(bytes(data)), Message)
        except ValueError:
            refused += 1
    assert refused > 100
