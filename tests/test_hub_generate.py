"""Under transformers' `generate`: padded batches, beams, sampling, assisted decoding, the cache; padding and packing."""

from __future__ import annotations

import copy

import pytest
import torch
from hub_models import ALL, WIDTH, close, ids_of, left_padded, made, model_of
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, DynamicCache, LogitsProcessor

from seqloom.core import BadInput
from seqloom.generate import Ring, generate
from seqloom.hub import SeqloomCache
from seqloom.hub.edge import segments_of

model = pytest.fixture(lambda: model_of(), name="model")

# -- generating --------------------------------------------------------------------------------------------------

ROWS = (3, 14, 1, 9)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_left_padded_batch_generates_what_its_rows_do_one_by_one(name):
    model = model_of(ALL[name])
    rows = [ids_of(1, n)[0] for n in ROWS]
    alone = [made(model, row[None])[0] for row in rows]
    assert made(model, *left_padded(rows)) == alone
    assert made(model, *left_padded(rows), use_cache=False) == alone
    assert made(model, *left_padded(rows), prefill_chunk_size=4) == alone
    assert made(model, *left_padded(rows), cache_implementation="static") == alone
    assert generate(layer_as_plain(model), [row.tolist() for row in rows], max_new_tokens=12) == alone


def layer_as_plain(model):
    layer = model.config.spec.build().to(model.dtype).eval()
    layer.stem, layer.stack, layer.head = model.model.stem, model.model.stack, model.lm_head
    return layer


def test_beam_search_in_a_padded_batch_equals_one_by_one_and_without_cache(model):
    rows = [ids_of(1, n)[0] for n in ROWS]
    alone = [made(model, row[None], num_beams=3)[0] for row in rows]
    assert made(model, *left_padded(rows), num_beams=3) == alone
    assert made(model, *left_padded(rows), num_beams=3, use_cache=False) == alone
    assert made(model, *left_padded(rows), num_beams=3, cache_implementation="static") == alone
    three = made(model, rows[0][None], num_beams=3, num_return_sequences=3)
    assert three[0] == alone[0] and len({tuple(row) for row in three}) == 3


class Noise(LogitsProcessor):
    """Sampling by the Gumbel trick, with noise that depends on a row's own tokens: the same alone and in a batch."""

    def __init__(self, new: int):
        self.new = new

    def __call__(self, input_ids, scores):
        for row, tokens in enumerate(input_ids.tolist()):
            while tokens and tokens[0] == 0:
                tokens = tokens[1:]
            generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
            scores[row] -= torch.log(-torch.log(torch.rand(scores.shape[1], generator=generator)))
        return scores


def test_sampling_in_a_padded_batch_equals_one_by_one(model):
    rows = [ids_of(1, n)[0] for n in ROWS]
    alone = [made(model, row[None], logits_processor=[Noise(12)])[0] for row in rows]
    assert made(model, *left_padded(rows), logits_processor=[Noise(12)]) == alone
    assert alone != [made(model, row[None])[0] for row in rows]


def test_sampling_with_a_seed_is_the_same_with_and_without_cache(model):
    rows = left_padded([ids_of(1, n)[0] for n in ROWS])
    draws = []
    for cached in (True, False):
        torch.manual_seed(5)
        draws.append(made(model, *rows, do_sample=True, temperature=1.3, top_k=20, use_cache=cached))
    assert draws[0] == draws[1]


def test_sampling_several_continuations_of_a_prompt(model):
    assert len({tuple(row) for row in made(model, ids_of(1, 6), do_sample=True, num_return_sequences=5)}) == 5


@pytest.mark.parametrize("prompt", [1, 7, 70])
@pytest.mark.parametrize("name", ["hybrid", "delta", "softmax"])
def test_assisted_decoding_gives_the_models_own_tokens(name, prompt):
    model = model_of(ALL[name])
    helper = copy.deepcopy(model)  # a helper that is often, and not always, right
    with torch.no_grad():
        for parameter in helper.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    helper.generation_config.num_assistant_tokens = 6
    helper.generation_config.assistant_confidence_threshold = 0.0
    counted = []
    model.model.register_forward_hook(lambda *args: counted.append(1))
    ids = ids_of(1, prompt)
    want = made(model, ids, new=40)
    alone = len(counted)
    counted.clear()
    assert made(model, ids, new=40, assistant_model=helper) == want
    assert len(counted) < alone == 40
    padded = F.pad(ids, (3, 0))
    assert made(model, padded, mask=(padded != 0).long(), new=20, assistant_model=helper) == [want[0][:20]]
    assert made(model, ids, new=20, prompt_lookup_num_tokens=3) == [want[0][:20]]


def test_generating_goes_on_from_a_cache(model):
    ids = ids_of(2, 10)
    want = made(model, ids, new=12)
    cache = SeqloomCache()
    first = model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 14
    again = model.generate(first, max_new_tokens=7, do_sample=False, past_key_values=cache)
    assert again[:, 10:].tolist() == want


def test_generating_from_vectors_in_place_of_ids(model):
    ids = ids_of(2, 9)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=8, do_sample=False)
    assert out.tolist() == made(model, ids, new=8)


def test_a_streamer_and_end_tokens_work(model):
    ids = ids_of(3, 6)
    free = made(model, ids)
    end = free[0][5]
    stopped = made(model, ids, eos_token_id=end, pad_token_id=0)
    for row, all_of_it in zip(stopped, free, strict=True):
        length = all_of_it.index(end) + 1 if end in all_of_it else len(row)
        assert row[:length] == all_of_it[:length] and set(row[length:]) <= {0}


# -- the cache ---------------------------------------------------------------------------------------------------

def run(model, ids, cache, **settings):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **settings).logits


@pytest.mark.parametrize("capacity", [None, 64])
def test_rows_of_the_cache_are_reordered_repeated_and_chosen(model, capacity):
    ids, more = ids_of(3, 12), ids_of(3, 4)
    cache = SeqloomCache(capacity, Ring(keep=2, every=3))
    run(model, ids[:, :10], cache), run(model, ids[:, 10:], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    close(run(model, more, cache), run(model, torch.cat([ids[order], more], 1), None)[:, 12:])
    cache.crop(-6)
    close(run(model, more, cache), run(model, torch.cat([ids[order][:, :10], more], 1), None)[:, 10:])
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    twice = more[[0, 0]]
    rows = torch.cat([ids[[0, 0], :10], more[[1, 1]], twice], 1)
    close(run(model, twice, cache), run(model, rows, None)[:, 14:])
    assert cache.batch_size == 2 and cache.get_seq_length() == 18
    cache.reset()
    assert cache.get_seq_length() == 0
    close(run(model, ids, cache), run(model, ids, None))


@pytest.mark.parametrize("capacity", [None, 200])
def test_cropping_is_as_if_the_tokens_had_not_been_read(model, capacity):
    ids = ids_of(2, 120)
    cache = SeqloomCache(capacity)
    cache.activate_past_recording()
    run(model, ids[:, :60], cache)
    length = 60
    for back, forth in ((3, 1), (1, 7), (12, 2), (2, 30), (0, 1), (16, 5)):
        cache.crop(-back)
        length -= back
        if back == 12:  # twice without a call between
            cache.crop(-2)
            length -= 2
        assert cache.get_seq_length() == length and length - cache.length < 32  # little is read again, prompt or not
        out = model(ids[:, length : length + forth], past_key_values=cache, output_hidden_states=True)
        whole = model(ids[:, : length + forth], output_hidden_states=True)
        close(out.logits, whole.logits[:, length:])
        for got, want in zip(out.hidden_states, whole.hidden_states, strict=True):
            close(got, want[:, length:])
        length += forth
    cache.crop(length - 4)  # a positive number is a length to keep
    assert cache.get_seq_length() == length - 4


def test_cropping_too_far_or_unprepared_is_an_error(model):
    cache = SeqloomCache()
    run(model, ids_of(1, 9), cache)
    with pytest.raises(ValueError, match="no earlier state was kept; call activate_past_recording"):
        cache.crop(-1)
    cache = SeqloomCache(ring=Ring(keep=2, every=4))
    for _ in range(30):
        run(model, ids_of(1, 1), cache)
    with pytest.raises(ValueError, match="cannot step back 25 tokens: of the 30 read"):
        cache.crop(-25)


def test_a_call_does_not_change_the_state_it_was_given(model):
    cache = SeqloomCache()
    run(model, ids_of(2, 7), cache)
    kept = copy.copy(cache)
    state = copy.deepcopy(cache.state)
    run(model, ids_of(2, 7), cache)
    for mine, theirs in zip(torch.utils._pytree.tree_leaves(kept.state), torch.utils._pytree.tree_leaves(state), strict=True):
        close(mine, theirs, 0)


def test_other_caches_and_masks_are_refused(model):
    with pytest.raises(BadInput, match=r"must be a SeqloomCache, .* found DynamicCache"):
        model(ids_of(1, 3), past_key_values=DynamicCache())
    with pytest.raises(BadInput, match=r"attention_mask must be \[batch, tokens\] = \[1, 3\]"):
        model(ids_of(1, 3), attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(BadInput, match="either input_ids or inputs_embeds"):
        model(ids_of(1, 3), inputs_embeds=torch.zeros(1, 3, WIDTH))
    with pytest.raises(BadInput, match="cache_implementation 'quantized'"):
        made(model, ids_of(1, 3), cache_implementation="quantized")


# -- padding and packing -----------------------------------------------------------------------------------------

def test_padding_left_right_or_inside_changes_nothing_even_if_it_is_nan(model):
    ids = ids_of(2, 11)
    want = model(ids).logits
    for places in (range(5, 16), range(11), (0, 1, 4, 5, 6, 8, 9, 10, 12, 13, 15)):
        places = torch.tensor(list(places))
        mask = torch.zeros(2, 16, dtype=torch.int64)
        mask[:, places] = 1
        x = torch.full((2, 16, WIDTH), torch.nan, dtype=torch.float64)
        x[:, places] = model.get_input_embeddings()(ids)
        close(model(inputs_embeds=x, attention_mask=mask).logits[:, places], want)


def packings(lengths):
    samples = [torch.full((n,), i) for i, n in enumerate(lengths)]
    return {
        "position_ids": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
        "positions from 2": {"position_ids": torch.cat([torch.arange(n) + 2 for n in lengths])[None]},
        "seq_idx": {"seq_idx": torch.cat(samples)[None].int()},
        "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).int()},
        "segments": {"segments": torch.cat(samples)[None] + 1},
        "numbered mask": {"attention_mask": torch.cat(samples)[None] + 1},
    }


@pytest.mark.parametrize("how", sorted(packings([1])))
def test_packed_samples_score_as_if_alone(model, how):
    lengths = [5, 1, 9, 3]
    parts = [ids_of(1, n) for n in lengths]
    alone = torch.cat([model(part).logits for part in parts], 1)
    close(model(torch.cat(parts, 1), **packings(lengths)[how]).logits, alone)


def test_packing_and_padding_together():
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 4, 5, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1]])
    found = segments_of(2, 8, attention_mask=mask, position_ids=positions)
    assert found.tolist() == [[0, 0, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 1, 1, 2]]
    assert segments_of(1, 4, attention_mask=torch.ones(1, 4), position_ids=torch.arange(4)[None]) is None
    assert segments_of(1, 2, attention_mask=torch.tensor([[0, 1, 1, 1]])) is None
    with pytest.raises(BadInput, match="cu_seq_lens must rise from 0 to the number of tokens of a single row, 4"):
        segments_of(1, 4, cu_seq_lens=torch.tensor([0, 3]))


def test_the_flattening_collator_trains_on_the_same_loss_as_a_padded_batch(model):
    rows = [ids_of(1, n)[0].tolist() for n in (4, 9, 2)]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row} for row in rows])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.where(ids == 0, -100, ids)
    close(model(**packed).loss, model(ids, attention_mask=(ids != 0).long(), labels=labels).loss, 1e-6)
    # the same without the collator's mark between samples: no label is predicted from another sample
    packed["labels"] = packed["input_ids"]
    close(model(**packed).loss, model(ids, attention_mask=(ids != 0).long(), labels=labels).loss, 1e-6)
