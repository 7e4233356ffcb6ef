"""Claims and evidence: what a run does with rates, seeds and controls, and when a stored result is still about this code."""

import sys
import types

import pytest
import torch

from seqloom.core import Budget, Claim, Paper, above, beats
from seqloom.mixers import LinearAttention
from seqloom.models import Block, Stack
from seqloom.parts import SwiGLU
from seqloom.recipes import recipe as load
from seqloom.recipes import slugs
from seqloom.study import claims, evidence
from seqloom.study.digest import influences
from seqloom.tasks import LatestValueRecall, SingleWriteRecall


def stack(hidden: int = 16) -> Stack:
    return Stack(dim=16, blocks=(Block(mixer=LinearAttention(heads=2), mlp=SwiGLU(hidden=hidden)),))


@pytest.fixture
def recipe(monkeypatch):
    """A recipe with one trained claim whose control has fewer classes, as a module that can be found by name."""
    module = types.ModuleType("recipe_of_a_test")
    module.PAPER = Paper(slug="test", number=0, title="a test")
    module.CLAIMS = (
        Claim(
            text="a test", where="here", task=LatestValueRecall(keys=2, values=4, writes=4),
            control=SingleWriteRecall(keys=2, values=3), arms={"method": stack(), "knockout": stack()},
            budget=Budget(steps=2, lrs=(1e-3, 3e-3), batch=4), seeds=2, require=(above("method", 0.0),),
        ),
    )
    monkeypatch.setitem(sys.modules, "recipe_of_a_test", module)
    return module


def test_a_claim_calibrates_alike_then_runs_fresh_seeds_and_asks_the_control_at_every_rate(recipe, monkeypatch):
    seen = []
    run = claims.run_job
    monkeypatch.setattr(claims, "run_job", lambda job: seen.append(job) or run(job))
    found = claims.run_claim("recipe_of_a_test", 0)
    for arm in ("method", "knockout"):
        mine = [job for job in seen if job.arm == arm]
        assert [job.lr for job in mine if job.seed == claims.CALIBRATION_SEED] == [1e-3, 3e-3]
        assert [job.seed for job in mine if job.task == "task"][2:] == [0, claims.SEED_STRIDE]
        assert [job.lr for job in mine if job.task == "control"] == [1e-3, 3e-3]
    assert found.holds and len(found.scores["method"]) == 2
    size = claims.fit(stack(), recipe.CLAIMS[0].task, Budget(steps=0), lr=1e-3, seed=0).parameters
    assert found.parameters == {"method": size, "knockout": size}, "parameters are those of the task, not of the control"


def test_arms_of_unequal_size_do_not_count(recipe):
    recipe.CLAIMS[0].arms["knockout"] = stack(hidden=40)
    found = claims.run_claim("recipe_of_a_test", 0)
    assert not found.holds and found.requirements["parameters within 2 %"] is False


def test_a_requirement_compares_means():
    means = {"method": {"score": 0.8}, "baseline": {"score": 0.5}}
    assert beats("method", "baseline", by=0.3).holds(means) and not beats("method", "baseline", by=0.31).holds(means)


def test_evidence_depends_on_what_a_recipe_names_and_not_on_the_rest_of_the_table():
    found = influences("seqloom.recipes.deltanet", "seqloom.study.claims")
    assert {"seqloom.mixers.delta", "seqloom.kernels.delta_scan", "seqloom.core.mixer", "seqloom.study.fit"} <= set(found)
    assert not {"seqloom.mixers.s4d", "seqloom.mixers.hydra", "seqloom.recipes.mamba", "seqloom.study.evidence"} & set(found)
    softmax = "seqloom.mixers.softmax", "seqloom.kernels.cuda_attention"
    assert softmax[1] in influences(softmax[0], gpu=True) and softmax[1] not in influences(softmax[0])


@pytest.mark.parametrize("slug", slugs())
def test_the_exactness_checks_of_a_recipe_hold(slug):
    found = [(check.text, float(check.measure()), check) for check in load(slug).CHECKS]
    assert not [(text, value) for text, value, check in found if not check.holds(value)]


def test_the_verdict_is_of_checks_and_claims(recipe):
    holds, fails = [{"holds": True}], [{"holds": True}, {"holds": False}]
    assert evidence.verdict(recipe, holds, holds) == "reproduced"
    assert evidence.verdict(recipe, fails, holds) == evidence.verdict(recipe, holds, fails) == "not reproduced"
    assert evidence.verdict(recipe, holds, None) == "not run"
    recipe.CLAIMS = ()
    assert evidence.verdict(recipe, holds, []) == "exact"


def test_the_page_says_when_the_code_has_changed_since(tmp_path, monkeypatch):
    torch.manual_seed(0)
    deltanet = load("deltanet")
    modules = influences(deltanet.__name__, claims.__name__)
    stored = {"paper": "deltanet", "verdict": "reproduced", "modules": modules,
              "digest": evidence.fingerprint(deltanet, modules)}
    evidence.write(stored, tmp_path)
    index = [(90, "deltanet", "DeltaNet"), (1, "other", "Other")]
    rows = evidence.rows(index, tmp_path, ["deltanet"])
    assert [(row.verdict, row.state) for row in rows] == [("reproduced", "current"), ("not run", "")]
    evidence.write({**stored, "digest": "of other code"}, tmp_path)
    assert evidence.rows(index, tmp_path, ["deltanet"])[0].state == "stale"
    assert "| 90 | `deltanet` DeltaNet | reproduced | [stale]" in evidence.papers_page(
        evidence.rows(index, tmp_path, ["deltanet"]))
