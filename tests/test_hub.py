"""The models as transformers sees them: loading, generating, padding and packing, training, adapting, saving."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithFlattening,
    DynamicCache,
    LogitsProcessor,
    Trainer,
    TrainingArguments,
)

from seqloom.core import BadInput, FailedRun, spec
from seqloom.core.marks import marks
from seqloom.data import tokenizer as tokenizers
from seqloom.generate import Ring, generate
from seqloom.hub import SeqloomCache, SeqloomConfig, SeqloomForCausalLM, SeqloomForSequenceClassification, export, load, wrap
from seqloom.hub.edge import segments_of
from seqloom.mixers import MIXERS, DeltaNet, GatedDeltaNet, LinearAttention, SoftmaxAttention
from seqloom.models import Block, Stack
from seqloom.models.presets import mixer_for
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

VOCAB, WIDTH = 61, 32
CHECKPOINTS = Path(__file__).parent / "checkpoints"
HYBRID = (GatedDeltaNet(heads=2), SoftmaxAttention(heads=4, kv_heads=2), LinearAttention(heads=2, conv=3))
CAUSAL = [name for name in MIXERS if mixer_for(name, WIDTH).causal]
ALL = {"hybrid": HYBRID, **{name: (mixer_for(name, WIDTH),) * 2 for name in CAUSAL}}


def spec_of(mixers=HYBRID, *, tie: bool = True, dropout: float = 0.0):
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40), dropout=dropout) for mixer in mixers)
    return language_model(vocab=VOCAB, stack=Stack(dim=WIDTH, blocks=blocks), tie=tie)


def layer_of(mixers=HYBRID, *, dtype: torch.dtype = torch.float64, **settings):
    """A plain model with scores spread out, so that no two tokens are near a tie."""
    layer = spec_of(mixers, **settings).build().to(dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def model_of(mixers=HYBRID, **settings) -> SeqloomForCausalLM:
    return wrap(layer_of(mixers, **settings), pad_token_id=0)


@pytest.fixture
def model():
    return model_of()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    return ids, mask


def close(got, want, tolerance: float = 1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# -- registering, saving, loading --------------------------------------------------------------------------------

def test_the_auto_classes_load_what_was_saved(model, folder):
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is SeqloomForCausalLM and not any(info.values())
    assert loaded.config.spec == model.config.spec and not loaded.training and loaded.dtype == torch.float64
    ids = ids_of(2, 19)
    close(loaded(ids).logits, model(ids).logits)
    close(AutoModel.from_pretrained(folder)(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_the_configuration_holds_the_spec_with_a_version_and_says_the_usual_things(folder):
    stored = json.loads((folder / "config.json").read_text())
    assert stored["seqloom"]["format"] == spec.FORMAT and stored["seqloom"]["spec"]["kind"] == "sequence_model"
    config = AutoConfig.from_pretrained(folder)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, WIDTH, 3)
    assert config.tie_word_embeddings and config.spec == spec_of()
    # what follows from the spec follows it, whatever else the file says
    (folder / "config.json").write_text(json.dumps({**stored, "vocab_size": 7, "hidden_size": 9}))
    assert AutoConfig.from_pretrained(folder).vocab_size == VOCAB


def test_importing_seqloom_registers_only_where_transformers_is_loaded():
    code = "import transformers, seqloom; print(transformers.AutoConfig.for_model('seqloom').model_type)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "seqloom", found.stderr


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_one_tensor_and_stored_once(tie, tmp_path):
    model = model_of(tie=tie)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tie
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.stem.weight) is tie
    ids = ids_of(1, 5)
    close(loaded(ids).logits, model(ids).logits)


def test_marked_parameters_stay_float32_and_marked(folder, model):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    wide = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, p in model.named_parameters() if marks(p)["keep_float32"]} != set()
    assert {p.dtype for name, p in loaded.named_parameters() if name not in wide} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert marks(loaded.get_parameter(name)) == marks(parameter)
    for name in wide:  # the digits are kept too
        close(loaded.get_parameter(name), model.get_parameter(name).float(), 0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    assert {name for name, p in fresh.named_parameters() if p.dtype == torch.float32} == wide
    assert torch.isfinite(loaded(ids_of(1, 9)).logits).all()
    for cast in (lambda m: m.to(torch.float16), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.bfloat16)):
        one = cast(copy.deepcopy(model).float())
        assert {name for name, p in one.named_parameters() if p.dtype == torch.float32} == wide
        for name in wide:
            close(one.get_parameter(name), model.get_parameter(name).float(), 0)
            assert marks(one.get_parameter(name)) == marks(model.get_parameter(name))


def test_what_a_checkpoint_lacks_starts_as_its_layer_would(folder):
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if name.endswith(("A_log", "blocks.1.mixer.qkv.weight", "norm.weight"))]
    assert len(lost) > 4
    rest = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == set(lost)
    values = dict(loaded.named_parameters())
    assert all(bool((values[name] == 1).all()) for name in lost if name.endswith("norm.weight"))
    assert 0.018 < values["model.stack.blocks.1.mixer.qkv.weight"].std() < 0.022
    rates = values["model.stack.blocks.0.mixer.A_log"].exp()
    assert bool(((rates >= 0.01) & (rates <= 16)).all())
    for name, value in tensors.items():
        if name not in lost:
            close(values[name], value, 0)


def test_a_newer_format_is_refused_and_an_older_one_upgraded(folder, monkeypatch):
    file = folder / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "seqloom": {**stored["seqloom"], "format": spec.FORMAT + 1}}))
    for read in (AutoModelForCausalLM.from_pretrained, load):
        with pytest.raises(BadInput, match=r"newer than this seqloom reads .*; upgrade seqloom"):
            read(folder)
    file.write_text(json.dumps(stored).replace('"linear"', '"lienar"'))
    monkeypatch.setattr(spec, "FORMAT", spec.FORMAT + 1)
    fix = lambda data: json.loads(json.dumps(data).replace('"lienar"', '"linear"'))  # noqa: E731
    monkeypatch.setitem(spec.UPGRADES, spec.FORMAT - 1, fix)
    assert AutoModelForCausalLM.from_pretrained(folder).config.spec == load(folder)[0].spec == spec_of()


@pytest.mark.parametrize("checkpoint", sorted(CHECKPOINTS.glob("format-*")), ids=lambda folder: folder.name)
def test_checkpoints_of_every_released_format_load(checkpoint):
    expected = json.loads((checkpoint / "expected.json").read_text())
    ids, want = torch.tensor(expected["ids"]), torch.tensor(expected["logits"])
    close(AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits, want, 1e-5)
    close(load(checkpoint)[0](ids).logits, want, 1e-5)


def test_damaged_and_pickled_weights_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:300], b"\0" * 200, whole[:-100], b""):
        file.write_bytes(broken)
        with pytest.raises(BadInput, match="damaged") as found:
            AutoModelForCausalLM.from_pretrained(folder)
        assert "\n" not in str(found.value)
    with pytest.raises(BadInput, match="pickled"):
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    torch.save({}, folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_wrapped_layer_shares_its_parameters_and_scores():
    layer = layer_of()
    model, ids = wrap(layer), ids_of(2, 8)
    assert {id(p) for p in model.parameters()} == {id(p) for p in layer.parameters()}
    close(model(ids).logits, layer(ids).logits, 0)


# -- generating --------------------------------------------------------------------------------------------------

def made(model, ids, mask=None, new: int = 12, **settings) -> list[list[int]]:
    settings = {"do_sample": False, **settings}
    out = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=new, **settings)
    return out[:, ids.shape[1] :].tolist()


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


# -- outputs and losses ------------------------------------------------------------------------------------------

def test_the_loss_shifts_labels_and_counts_as_asked(model):
    ids = ids_of(2, 9)
    labels = ids.clone()
    labels[0, 3:5] = -100
    logits = model(ids).logits.float()
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    close(model(ids, labels=labels).loss, want / 14, 1e-6)
    close(model(ids, labels=labels, num_items_in_batch=50).loss, want / 50, 1e-6)


def test_logits_to_keep_and_tuples(model):
    ids = ids_of(2, 9)
    all_of_them = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, all_of_them[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, all_of_them[:, [1, 4]])
    close(model(ids, return_dict=False)[0], all_of_them)


def test_hidden_states_are_what_enters_each_block_and_the_output(model):
    ids = ids_of(2, 9)
    out = model(ids, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 4 and out.past_key_values is None
    close(out.hidden_states[0], model.get_input_embeddings()(ids))
    close(out.hidden_states[-1], model.model(ids).last_hidden_state)
    close(model(inputs_embeds=out.hidden_states[0]).logits, out.logits)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids, mask = left_padded([ids_of(1, 9)[0], ids_of(1, 5)[0]])
    gradients = []
    for enabled in (False, True):
        model.train()
        (model.activation_checkpointing_enable if enabled else model.activation_checkpointing_disable)()
        assert model.model.stack.checkpointing is enabled
        passes = []
        hook = model.model.stack.blocks[0].register_forward_pre_hook(lambda *args, passes=passes: passes.append(1))
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        hook.remove()
        assert len(passes) == 1 + enabled
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        close(plain, again)


def test_training_makes_no_cache_unless_asked(model):
    assert model.train()(ids_of(1, 4)).past_key_values is None
    assert isinstance(model.eval()(ids_of(1, 4)).past_key_values, SeqloomCache)


# -- other heads -------------------------------------------------------------------------------------------------

def test_a_sequence_classifier_reads_the_last_real_token(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).double()
    ids = ids_of(1, 7)
    want = model(ids).logits
    assert want.shape == (1, 3)
    for pad in ((4, 0), (0, 4)):
        padded, mask = F.pad(ids, pad, value=9), F.pad(torch.ones_like(ids), pad)
        close(model(padded, attention_mask=mask).logits, want)
    close(model(ids, labels=torch.tensor([2])).loss, F.cross_entropy(want, torch.tensor([2])))
    model.save_pretrained(folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.num_labels == again.config.spec.head.classes == 3
    close(again(ids).logits, want)
    assert type(wrap(load(folder)[0])) is SeqloomForSequenceClassification


def test_a_token_classifier_and_a_masked_language_model(folder, tmp_path):
    tagger = AutoModelForTokenClassification.from_pretrained(folder, num_labels=4)
    ids = ids_of(2, 6)
    out = tagger(ids, labels=ids % 4)
    assert out.logits.shape == (2, 6, 4) and torch.isfinite(out.loss)
    both = (LinearAttention(heads=2, direction="bidirectional"), SoftmaxAttention(heads=2, direction="bidirectional"))
    filler = wrap(layer_of(both))
    filler.save_pretrained(tmp_path / "filler")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "filler")
    out = loaded(ids, labels=ids)
    close(out.loss, F.cross_entropy(out.logits.float().flatten(0, 1), ids.flatten()), 1e-6)
    close(out.logits, filler(ids).logits)
    with pytest.raises(BadInput, match=r"needs causal mixers, and that of block 0 \(linear\) is not"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "filler")


def test_the_vocabulary_can_grow_and_shrink(model, tmp_path):
    ids = ids_of(1, 6)
    old = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert model.config.vocab_size == model.config.spec.stem.vocab == VOCAB + 3
    assert model.lm_head.weight is model.model.stem.weight
    close(model(ids).logits[..., :VOCAB], old)
    model.save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    model.resize_token_embeddings(VOCAB)
    close(model(ids).logits, old)


# -- training and adapting ---------------------------------------------------------------------------------------

class Repeats(torch.utils.data.Dataset):
    """Rows that say one thing over and over: easy to learn."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = (torch.arange(16) * (i % 3 + 1) + i) % 10 + 1
        return {"input_ids": ids, "labels": ids.clone()}


def trained(model, folder, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, learning_rate=1e-2, max_steps=12, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeats())
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}])
def test_it_trains_under_transformers_trainer(settings, tmp_path):
    trainer = trained(wrap(spec_of().build()), tmp_path, **settings)
    found = losses(trainer)
    assert found[-1] < 0.75 * found[0] and 3.5 < found[0] < 4.7
    assert trainer.evaluate(Repeats())["eval_loss"] < found[0]
    assert trainer.predict(Repeats()).predictions.shape == (32, 16, VOCAB)
    trainer.save_model(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = Repeats()[0]["input_ids"][None]
    close(again(ids).logits, trainer.model.eval()(ids).logits, 1e-6)


def test_it_takes_lora_and_gives_it_back(folder, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = ids_of(2, 8)
    before = base(ids).logits.detach()
    config = peft.LoraConfig(r=4, target_modules=["qkv", "out", "o_proj", "gate_up"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    close(adapted(ids).logits, before, 1e-6)
    share = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert 0 < share < 0.5 * sum(p.numel() for p in adapted.parameters())
    found = losses(trained(adapted, tmp_path / "run", gradient_checkpointing=True))
    assert found[-1] < found[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    want = adapted(ids).logits
    assert (want - before).abs().max() > 1e-3
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    close(again(ids).logits, want, 1e-5)
    rows = [ids_of(1, n)[0] for n in (3, 7)]
    padded, mask = left_padded(rows)
    out = again.generate(input_ids=padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 7:].tolist()
    assert out == [made(again, row[None], new=6)[0] for row in rows]
    close(again.merge_and_unload()(ids).logits, want, 1e-4)


def test_lora_finds_all_linear_layers_and_the_classifiers_head(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    free = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in name for name in free) and any("qkv.lora_A" in name for name in free)
    adapted(ids_of(2, 5), labels=torch.tensor([0, 2])).loss.backward()


# -- folders -----------------------------------------------------------------------------------------------------

@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizers.learn(["the quick brown fox", "jumps over it"] * 4, vocab=260)


@pytest.fixture
def shipped(tokenizer, tmp_path):
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40)) for mixer in (DeltaNet(heads=2), DeltaNet(heads=2), HYBRID[1]))
    layer = language_model(vocab=260, stack=Stack(dim=WIDTH, blocks=blocks)).build()
    facts = {"data": "a fox", "steps": 1200, "held-out bits per byte": 1.234}
    return layer, export(layer, tokenizer, tmp_path / "fox", card=facts)


def test_an_exported_folder_loads_both_ways(shipped, tokenizer):
    layer, folder = shipped
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }
    plain, found = load(folder)
    ids = torch.tensor([found.encode("the fox").ids])
    assert plain.spec == layer.spec and not plain.training and found.encode("the fox").ids == tokenizer.encode("the fox").ids
    assert plain.head.weight is plain.stem.weight
    close(plain(ids).logits, layer.eval()(ids).logits, 1e-5)
    for name, parameter in layer.named_parameters():
        assert marks(plain.get_parameter(name)) == marks(parameter)
    loaded, reader = AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    batch = reader(["the fox", "jumps"], return_tensors="pt", padding=True)
    out = loaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert loaded.generation_config.eos_token_id == found.token_to_id(tokenizers.START) and out.shape[0] == 2
    export(plain, reader, folder)
    close(load(folder)[0](ids).logits, plain(ids).logits, 1e-5)


def test_the_card_says_what_it_is_and_how_to_load_it(shipped):
    layer, folder = shipped
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and 'tags: ["seqloom", "delta", "softmax"]' in card
    parameters = sum(p.numel() for p in layer.parameters())
    for line in (f"| Parameters | {parameters:,} |", "| Mixers | 2 x DeltaNet, 1 x SoftmaxAttention |", "| Data | a fox |",
                 "| Steps | 1,200 |", "| Held-out bits per byte | 1.234 |", "import seqloom.hub",
                 'AutoModelForCausalLM.from_pretrained("fox")'):
        assert line in card


def test_loading_in_another_dtype_keeps_marked_parameters_wide(folder):
    layer, tokenizer = load(folder, dtype=torch.bfloat16)
    assert tokenizer is None
    for parameter in layer.parameters():
        assert parameter.dtype == (torch.float32 if marks(parameter)["keep_float32"] else torch.bfloat16)


def test_a_failed_export_leaves_what_was_there(shipped, tokenizer, monkeypatch):
    layer, folder = shipped
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        layer.stem.weight.add_(1)
    monkeypatch.setattr("seqloom.hub.files.model_card", full)
    with pytest.raises(FailedRun, match=r"could not be written to .*: No space left on device"):
        export(layer, tokenizer, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(FailedRun, match="could not be written to"):
        export(layer, tokenizer, folder / "README.md" / "inside")


def test_folders_that_are_not_models_are_said_so_in_one_sentence(folder, tmp_path):
    def fails(message):
        with pytest.raises(BadInput, match=message) as found:
            load(folder)
        assert "\n" not in str(found.value) and str(folder) in str(found.value)

    with pytest.raises(BadInput, match="nowhere is not there; a folder with a saved model is expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config.json is a file; a folder"):
        load(folder / "config.json")
    with pytest.raises(BadInput, match=r"has no config\.json, so it is not a saved model"):
        load(tmp_path)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, text = load_file(file), config.read_text()
    name = "model.stack.blocks.0.mixer.A_log"
    for changed, message in [
        ({key: value for key, value in tensors.items() if key != name}, r"lacks 1 of the model's tensors \(such as stack"),
        ({**tensors, "model.extra": torch.zeros(1)}, r"has 1 it does not know \(such as extra\)"),
        ({**tensors, name: torch.zeros(5)}, r"A_log in .* is \[5\], and the model .* needs \[2\]"),
    ]:
        save_file(changed, file)
        fails(message)
    file.write_bytes(b"no tensors at all")
    fails(r"model\.safetensors is damaged")
    file.unlink()
    fails(r"has no model\.safetensors")
    for broken, message in [
        ("{", "is not valid JSON"), ("[]", "must hold a JSON object"),
        (text.replace('"linear"', '"linaer"'), "did you mean 'linear'"), (text.replace('"heads": 2', '"hedas": 2'), "'hedas'"),
        (text.replace('"seqloom": {', '"seqloom_was": {'), "no spec"),
    ]:
        config.write_text(broken)
        fails(message)


def test_a_config_without_a_spec_makes_no_model():
    with pytest.raises(BadInput, match="has no spec"):
        SeqloomForCausalLM(SeqloomConfig())
    with pytest.raises(BadInput, match="must hold a spec and its format"):
        SeqloomConfig(seqloom="linear")
