"""The models as transformers sees them: registering, saving, loading, outputs and heads, training, adapting."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from hub_models import CHECKPOINTS, VOCAB, WIDTH, close, ids_of, layer_of, left_padded, made, model_of, saved, spec_of
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from seqloom.core import BadInput, spec
from seqloom.core.marks import marks
from seqloom.hub import SeqloomCache, SeqloomForCausalLM, SeqloomForSequenceClassification, load, wrap
from seqloom.mixers import LinearAttention, SoftmaxAttention

model = pytest.fixture(lambda: model_of(), name="model")
folder = pytest.fixture(saved, name="folder")

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
