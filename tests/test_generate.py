"""Decoding with a state: the same tokens however the prompt is read, padded or stepped back over, and in constant memory."""

from __future__ import annotations

import pytest
import torch

from seqloom.core import BadInput
from seqloom.core import state as st
from seqloom.generate import Decoder, Ring, Sampler, generate, left_pad, stream
from seqloom.mixers import DeltaNet, LinearAttention, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

VOCAB = 61
MIXERS = {
    "linear": (LinearAttention(heads=2, conv=3), LinearAttention(heads=2)),
    "softmax": (SoftmaxAttention(heads=2), SoftmaxAttention(heads=4, kv_heads=2, position="alibi")),
    "window": (SoftmaxAttention(heads=2, window=7), DeltaNet(heads=2)),
    "hybrid": (DeltaNet(heads=2), SoftmaxAttention(heads=2), LinearAttention(heads=2)),
}


def make(name: str):
    """A model in float64 whose scores are spread out, so that no two tokens are near a tie."""
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40)) for mixer in MIXERS[name])
    model = language_model(vocab=VOCAB, stack=Stack(dim=32, blocks=blocks), tie=False).build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=sorted(MIXERS))
def model(request):
    return make(request.param)


def whole(model, ids):
    """The definition: score everything again for every token."""
    with torch.no_grad():
        return model(ids).logits[:, -1]


def continued(model, prompt: list[int], new: int) -> list[int]:
    row = list(prompt)
    for _ in range(new):
        row.append(int(whole(model, torch.tensor([row])).argmax()))
    return row[len(prompt) :]


def prompt(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_greedy_with_a_state_equals_scoring_everything_again(model, chunk):
    ids = prompt(19)
    assert generate(model, ids, max_new_tokens=12, chunk=chunk) == [continued(model, ids[0].tolist(), 12)]


def test_prompts_of_different_lengths_side_by_side_equal_one_by_one(model):
    prompts = [prompt(n)[0].tolist() for n in (3, 17, 1, 9)]
    together = generate(model, prompts, max_new_tokens=10, chunk=6)
    assert together == [generate(model, [row], max_new_tokens=10)[0] for row in prompts]


def test_sampling_is_the_same_with_the_same_seed_and_changes_with_it(model):
    ids = prompt(8)
    draws = [generate(model, ids, max_new_tokens=20, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_row_ends_at_its_stop_token_or_sequence_and_the_others_go_on(model):
    prompts = [prompt(7)[0].tolist() for _ in range(3)]
    free = generate(model, prompts, max_new_tokens=15)
    stop = free[0][4]
    cut = lambda row: row[: row.index(stop) + 1] if stop in row else row  # noqa: E731
    assert generate(model, prompts, max_new_tokens=15, stop=[stop]) == [cut(row) for row in free]
    pair = free[1][3:5]
    found = generate(model, prompts, max_new_tokens=15, stop=[pair])
    assert found[1][-2:] == pair and len(found[1]) <= 5


def test_the_stream_hands_out_tokens_as_they_come(model):
    ids, seen = prompt(6, rows=2), []
    rows = generate(model, ids, max_new_tokens=5, callback=lambda step: seen.append(step.ids.tolist()))
    steps = stream(model, ids, max_new_tokens=5)
    assert [step.ids.tolist() for step in steps] == seen == [list(pair) for pair in zip(*rows, strict=True)]
    first = seen[0][0]
    late = [step for step in stream(model, ids, max_new_tokens=5, stop=[first])]
    assert [int(step.ids[0]) for step in late] == [first] * len(late) and bool(late[0].done[0])
    endless = stream(model, ids, max_new_tokens=None)
    assert [next(endless).ids.tolist() for _ in range(5)] == seen


@pytest.mark.parametrize("name", ["linear", "window"])
def test_memory_of_a_constant_state_does_not_grow_and_stays_where_it_is(name):
    model = make(name)
    decoder = Decoder(model, chunk=8)
    decoder.read(prompt(4))
    size, places = st.count_bytes(decoder.state), [leaf.data_ptr() for leaf in st.leaves(decoder.state)]
    for _ in range(40):
        decoder.read(prompt(1))
    decoder.read(prompt(50))
    assert st.count_bytes(decoder.state) == size == model.state_bytes(10_000)
    assert [leaf.data_ptr() for leaf in st.leaves(decoder.state)] == places


def test_a_prompt_is_read_in_pieces_of_fixed_length(model):
    lengths = []
    model.stack.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    decoder = Decoder(model, chunk=16, ring=Ring(every=4))
    decoder.read(prompt(100))
    assert lengths == [16] * 6 + [4]


def test_memory_of_a_growing_state_is_taken_once(model):
    decoder = Decoder(model, capacity=64)
    places = [leaf.data_ptr() for leaf in st.leaves(decoder.state)]
    for _ in range(10):
        decoder.read(prompt(5))
    assert [leaf.data_ptr() for leaf in st.leaves(decoder.state)] == places


@pytest.mark.parametrize("capacity", [None, 200])
def test_stepping_back_is_as_if_the_tokens_had_not_been_read(model, capacity):
    decoder = Decoder(model, batch=2, capacity=capacity, ring=Ring(keep=3, every=5), chunk=16)
    ids = prompt(150, rows=2)
    decoder.read(ids[:, :60])
    length = 60
    for step, back in enumerate((1, 4, 9, 2, 10, 5)):
        decoder.crop(back)
        length -= back
        for _ in range(11 + step):
            scores = decoder.read(ids[:, length : length + 1])
            length += 1
        torch.testing.assert_close(scores, whole(model, ids[:, :length]), rtol=1e-9, atol=1e-9)
    assert decoder.length == length and 10 <= decoder.ring.reach <= 20


def test_stepping_back_over_padding_and_into_a_prompt(model):
    prompts = [prompt(40)[0].tolist(), prompt(12)[0].tolist()]
    ids, segments = left_pad(prompts)
    decoder = Decoder(model, batch=2, ring=Ring(keep=2, every=4))
    decoder.read(ids, segments)
    decoder.read(prompt(1, rows=2))
    decoder.crop(5)
    scores = decoder.read(ids[:, 36:], segments[:, 36:])
    for row, tokens in enumerate(prompts):
        torch.testing.assert_close(scores[row : row + 1], whole(model, torch.tensor([tokens])), rtol=1e-9, atol=1e-9)


def test_stepping_back_further_than_the_ring_reaches_is_an_error():
    model = make("linear")
    decoder = Decoder(model, ring=Ring(keep=2, every=4))
    for _ in range(30):
        decoder.read(prompt(1))
    with pytest.raises(ValueError, match="cannot step back 20 tokens: of the 30 read, the last 6 can be undone"):
        decoder.crop(20)
    with pytest.raises(ValueError, match="cannot step back 1 tokens"):
        Decoder(model).crop(1)


# -- what is drawn -----------------------------------------------------------------------------------------------

def kept(sampler: Sampler, logits: list[float]) -> list[bool]:
    return torch.isfinite(sampler.scores(torch.tensor([logits])))[0].tolist()


def test_sampling_steps_by_hand():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert kept(Sampler(temperature=1, top_k=2), logits) == [True, True, False, False]
    assert kept(Sampler(temperature=1, top_p=0.6), logits) == [True, True, False, False]
    assert kept(Sampler(temperature=1, top_p=0.71), logits) == [True, True, True, False]
    assert kept(Sampler(temperature=1, top_p=1e-9), logits) == [True, False, False, False]
    assert kept(Sampler(temperature=1, min_p=0.45), logits) == [True, True, True, False]
    assert kept(Sampler(temperature=1), logits) == [True] * 4
    flat = Sampler(temperature=2).scores(torch.tensor([logits])).softmax(-1)
    root = torch.tensor([0.4, 0.3, 0.2, 0.1]).sqrt()
    torch.testing.assert_close(flat[0], root / root.sum())


def test_repetition_penalty_pushes_seen_tokens_down_whatever_their_sign():
    seen = torch.tensor([[True, True, False]])
    scores = Sampler(repetition_penalty=2.0).scores(torch.tensor([[3.0, -3.0, 1.0]]), seen)
    assert scores.tolist() == [[1.5, -6.0, 1.0]]


def test_a_strong_penalty_repeats_no_token(model):
    new = generate(model, prompt(5), max_new_tokens=30, repetition_penalty=1e9)[0]
    assert len(set(new)) == 30


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20000, 3)
    share = torch.bincount(Sampler(temperature=1).draw(logits), minlength=3) / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)


# -- what bad input gets -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": -1.0}, "temperature must be a number of at least 0"),
    ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\]"),
    ({"min_p": 2.0}, "min_p must be"),
    ({"top_k": -3}, "top_k must be"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
    ({"stop": [[]]}, "a stop sequence must have at least one token"),
    ({"chunk": 0}, "chunk must be at least 1 token"),
])
def test_settings_out_of_range_are_refused_before_anything_is_computed(settings, message):
    with pytest.raises(BadInput, match=message):
        stream(make("linear"), [1, 2], **settings)


def test_bad_prompts_are_refused():
    model = make("linear")
    with pytest.raises(BadInput, match="prompt 1 has no tokens"):
        stream(model, [[1], []])
    with pytest.raises(BadInput, match="the prompt has no tokens"):
        stream(model, torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(BadInput, match=f"token {VOCAB}, and the model knows tokens 0 to {VOCAB - 1}"):
        stream(model, [1, VOCAB])
    with pytest.raises(BadInput, match="pad prompts on the left"):
        next(stream(model, torch.tensor([[1, 0]]), segments=torch.tensor([[1, 0]])))
    both = Block(mixer=LinearAttention(heads=2, direction="bidirectional"))
    with pytest.raises(BadInput, match="not causal"):
        stream(language_model(vocab=9, stack=Stack(dim=32, blocks=(both,))).build(), [1])


def test_dropout_is_off_while_decoding_and_the_mode_is_put_back():
    blocks = (Block(mixer=LinearAttention(heads=2), dropout=0.5),)
    model = language_model(vocab=VOCAB, stack=Stack(dim=32, blocks=blocks)).build().double()
    ids = prompt(6)
    assert model.training and generate(model, ids, max_new_tokens=8) == generate(model, ids, max_new_tokens=8)
    assert model.training
