from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import Run, TaskConfig
from ingle.config.loader import load_run
from ingle.config.rules import RUN_RULES, TASK_RULES, check
from ingle.errors import ConfigError

START = ["--model.id=m", "--data.sources=a.jsonl", "--output=o"]
#: A reward, which objectives with rewards need.
REWARD = "--objective.rewards=reward.py"
TASK = "--evaluate.sources=e.jsonl"

#: Flags that violate each rule, and flags that do not.
VIOLATIONS: dict[str, tuple[list[str], list[str]]] = {
    "one-process-shares-nothing": (
        ["--parallel.kind=none", "--parallel.num_processes=2"],
        ["--parallel.kind=ddp", "--parallel.num_processes=2"],
    ),
    "groups-need-hsdp": (["--parallel.shard_size=2"], ["--parallel.shard_size=2", "--parallel.kind=hsdp"]),
    "groups-are-equal": (
        ["--parallel.kind=hsdp", "--parallel.num_processes=6", "--parallel.shard_size=4"],
        ["--parallel.kind=hsdp", "--parallel.num_processes=6", "--parallel.shard_size=3"],
    ),
    "only-a-frozen-base-is-offloaded": (
        ["--parallel.offload=true", "--adapter=none"],
        ["--parallel.offload=true", "--adapter=lora"],
    ),
    "offload-needs-shards": (
        ["--parallel.offload=true", "--parallel.kind=ddp"],
        ["--parallel.offload=true", "--parallel.kind=fsdp"],
    ),
    "imatrix-needs-eager-layers": (["--train.imatrix=true", "--train.compile=true"], ["--train.imatrix=true"]),
    "warmup-shorter-than-run": (
        ["--optim.warmup_steps=10", "--train.num_steps=10"],
        ["--optim.warmup_steps=9", "--train.num_steps=10"],
    ),
    "constant-has-no-end": (
        ["--optim.schedule=constant", "--optim.min_lr_ratio=.1"],
        ["--optim.schedule=linear", "--optim.min_lr_ratio=.1"],
    ),
    "bottlenecks-have-one-width": (
        ["--adapter=bottleneck", "--adapter.size=8", "--adapter.reduction=4"],
        ["--adapter=bottleneck", "--adapter.size=8"],
    ),
    "bitfit-trains-something": (
        ["--adapter=bitfit", "--adapter.biases=false"],
        ["--adapter=bitfit", "--adapter.biases=false", "--adapter.norms"],
    ),
    "virtual-tokens-begin-somewhere": (
        ["--adapter=prompt", "--adapter.init=text"],
        ["--adapter=prefix", "--adapter.init=tokens", "--adapter.init_text=hello"],
    ),
    "only-texts-are-read": (["--adapter=prefix", "--adapter.init_text=hello"], ["--adapter=prefix"]),
    "loftq-gives-back-what-was-rounded": (
        ["--adapter.init=loftq"],
        ["--adapter.init=loftq", "--base.format=nf4"],
    ),
    "initial-values-read-given-data": (
        ["--adapter.init=eva", "--objective.kind=grpo", REWARD],
        ["--adapter.init=eva", "--objective.kind=dpo"],
    ),
    "networks-are-not-saved": (
        ["--adapter=prompt", "--adapter.encoder=mlp", "--adapter.path=p"],
        ["--adapter=prompt", "--adapter.encoder=mlp"],
    ),
    "networks-begin-at-random": (
        ["--adapter=prefix", "--adapter.encoder=mlp", "--adapter.init=tokens", "--adapter.init_text=hello"],
        ["--adapter=prefix", "--adapter.encoder=mlp", "--adapter.init=random"],
    ),
    "virtual-tokens-are-few": (
        ["--adapter=prompt", "--adapter.num_virtual_tokens=64", "--data.max_seq_len=64"],
        ["--adapter=prompt", "--adapter.num_virtual_tokens=63", "--data.max_seq_len=64"],
    ),
    "methods-of-peft-are-known": (
        ["--adapter.kind=peft", "--adapter.method=lora"],
        ["--adapter.kind=peft", "--adapter.method=vera"],
    ),
    "methods-read-plain-weights": (
        ["--adapter.kind=peft", "--adapter.method=hra", "--base=nf4"],
        ["--adapter.kind=peft", "--adapter.method=loha", "--base=nf4"],
    ),
    "methods-stay-in-one-place": (
        ["--adapter.kind=peft", "--adapter.method=vera", "--parallel.kind=fsdp"],
        ["--adapter.kind=peft", "--adapter.method=oft", "--parallel.kind=fsdp"],
    ),
    "adalora-needs-its-gradients": (
        ["--adapter.kind=peft", "--adapter.method=adalora", "--optim.rule.kind=subspace", "--optim.rule.dim=8"],
        ["--adapter.kind=peft", "--adapter.method=adalora"],
    ),
    "targets-are-named-once": (
        ["--adapter={kind: peft, method: oft, target_modules: [q_proj], options: {target_modules: [v_proj]}}"],
        ["--adapter.kind=peft", "--adapter.method=oft", "--adapter.options.target_modules=[v_proj]"],
    ),
    "precondition-needs-frozen-a": (["--adapter.precondition"], ["--adapter.precondition", "--adapter.freeze_a"]),
    "low-memory-is-for-full-fine-tuning": (["--optim.rule=galore"], ["--optim.rule=galore", "--adapter=none"]),
    "whole-weights-are-not-sharded": (
        ["--optim.rule=lisa", "--adapter=none", "--parallel.kind=zero2"],
        ["--optim.rule=lisa", "--adapter=none", "--parallel.kind=ddp"],
    ),
    "whole-weights-are-not-offloaded": (
        ["--optim.rule=subspace", "--parallel.offload"],
        ["--optim.rule=subspace", "--parallel.offload=false"],
    ),
    "drawn-layers-are-not-compiled": (
        ["--optim.rule=lisa", "--adapter=none", "--train.compile"],
        ["--optim.rule=lisa", "--adapter=none", "--train.compile=auto"],
    ),
    "a-subspace-has-one-rate": (
        ["--optim.rule=subspace", "--adapter.lora_plus_ratio=4"],
        ["--optim.rule=adamw", "--adapter.lora_plus_ratio=4"],
    ),
    "a-subspace-has-no-decay": (
        ["--optim.rule=subspace", "--optim.weight_decay=0.1"],
        ["--optim.rule=subspace", "--optim.weight_decay=0"],
    ),
    "full-needs-plain-base": (["--adapter=none", "--base=nf4"], ["--adapter=none"]),
    "random-needs-plain-base": (["--model.init=random", "--base=int8", "--adapter=lora"], ["--base=int8"]),
    "random-needs-full": (["--model.init=random"], ["--model.init=random", "--adapter=none"]),
    "trained-base-needs-no-adapter": (
        ["--base.format=ternary", "--base.train=true"],
        ["--base.format=ternary", "--base.train=true", "--adapter=none"],
    ),
    "some-formats-are-only-read": (
        ["--base.format=iq2_xs"],
        ["--base.format=iq2_xs", "--model.id=m.gguf"],
    ),
    "qa-lora-needs-offsets": (
        ["--adapter.kind=qa_lora", "--base=q4_k"],
        ["--adapter.kind=qa_lora", "--base=q5_1"],
    ),
    "merges-into-a-format": (["--adapter.merge_aware.fraction=.5"], ["--adapter.merge_aware.format=q4_k"]),
    "bytes-of-whole-texts": (
        ["--objective.kind=span", TASK, "--evaluate.metrics=[perplexity,bits_per_byte]"],
        ["--objective.kind=span", TASK, "--evaluate.metrics=[perplexity]"],
    ),
    "validation-needs-data": (
        ["--train.keep_best", "--train.early_stopping.patience=2", TASK, "--evaluate.every=5"],
        ["--train.keep_best", TASK, "--evaluate.every=5", "--data.validation=v.jsonl"],
    ),
    "validation-has-one-origin": (
        ["--data.validation.share=.1", "--data.validation.sources=v.jsonl"],
        ["--data.validation.share=.1"],
    ),
    "evaluation-needs-rows": (["--evaluate.seed=1"], ["--evaluate.every=1", "--data.validation=.1"]),
    "validation-samples-need-a-task": (
        ["--evaluate.num_validation_samples=5", "--data.validation=.1"],
        ["--evaluate.num_validation_samples=5", "--data.validation=.1", TASK],
    ),
    "control-tokens-alike": (
        ["--data.control_tokens=keep", "--evaluate.sources=t.jsonl"],
        ["--data.control_tokens=keep", "--evaluate.sources=t.jsonl", "--evaluate.control_tokens=keep"],
    ),
    "only-sft-distinguishes-turns": (["--objective=clm", "--data.train_on=last"], ["--objective=clm"]),
    "system-needs-conversations": (["--objective=tag", "--data.system=hi"], ["--objective=clm", "--data.system=hi"]),
    "preference-options-are-read": (
        ["--objective=dpo", "--objective.penalty=50"],
        ["--objective=dpo", "--objective.penalty=50", "--objective.loss=dpop"],
    ),
    "exo-smooths": (
        ["--objective=dpo", "--objective.loss=exo", "--objective.label_smoothing=0"],
        ["--objective=dpo", "--objective.loss=exo"],
    ),
    "reference-without-dropout": (
        ["--objective=kto", "--adapter.dropout=.1"],
        ["--objective=simpo", "--adapter.dropout=.1"],
    ),
    "answers-carry-the-loss": (["--objective=cpo", "--data.train_on=all"], ["--objective=cpo", "--data.train_on=last"]),
    "only-plain-text-splits": (["--data.too_long=split"], ["--data.too_long=split", "--objective=mlm"]),
    "masked-tokens-add-up": (
        ["--objective=mlm", "--objective.replace=.8", "--objective.random=.3"],
        ["--objective=mlm", "--objective.replace=.8", "--objective.random=.2"],
    ),
    "span-options-fit-the-style": (
        ["--objective=span", "--objective.style=bart", "--objective.density=.2"],
        ["--objective=span", "--objective.style=bart", "--objective.rate=.2"],
    ),
    "modes-are-known": (
        ["--objective=span", "--objective.style=ul2", "--objective.mode_tokens={R: a, X: b}"],
        ["--objective=span", "--objective.style=ul2", "--objective.mode_tokens={R: a, X: b, S: c}"],
    ),
    "windows-advance": (
        ["--objective=answer", "--data.max_seq_len=128"],
        ["--objective=answer", "--data.max_seq_len=256"],
    ),
    "labels-once": (
        ["--objective=classify", "--objective.labels=[a, b, a]"],
        ["--objective=classify", "--objective.labels=[a, b]"],
    ),
    "tags-fit-the-scheme": (
        ["--objective=tag", "--objective.labels=[O, L-PER, S-PER]", "--objective.scheme=bilou", "--objective.stride=8"],
        ["--objective=tag", "--objective.labels=[O, S-PER]", "--objective.scheme=iobes", "--objective.stride=8"],
    ),
    "metrics-suit-the-objective": (
        ["--objective=classify", "--evaluate.sources=x.jsonl", "--evaluate.metrics=[bleu]"],
        ["--objective=classify", "--evaluate.sources=x.jsonl", "--evaluate.metrics=[accuracy]"],
    ),
    "one-weight-per-label": (
        ["--objective=classify", "--objective.labels=[a, b]", "--objective.class_weights=[1.0, 2.0, 3.0]"],
        ["--objective=classify", "--objective.labels=[a, b]", "--objective.class_weights=[1.0, 2.0]"],
    ),
    "numbers-have-no-classes": (
        ["--objective=classify", "--objective.problem=regression", "--objective.class_weights=balanced"],
        ["--objective=classify", "--objective.problem=single", "--objective.class_weights=balanced"],
    ),
    "output-is-not-the-model": (["--output=x/../m"], ["--output=m/run"]),
    "output-is-a-folder": (["--output=file/run"], ["--output=here"]),
    "output-is-not-the-adapter": (["--adapter.path=o/adapter"], ["--adapter.path=p/adapter"]),
    "trained-or-adapted": (
        ["--adapter.target_modules=[lm_head, q_proj]", "--adapter.trainable_modules=lm_head"],
        ["--adapter.target_modules=q_proj", "--adapter.trainable_modules=lm_head"],
    ),
    "orthogonal-is-even": (
        ["--adapter.init=orthogonal", "--adapter.rank=3"],
        ["--adapter.init=orthogonal", "--adapter.rank=4"],
    ),
    "frozen-a-has-one-rate": (
        ["--adapter.freeze_a=true", "--adapter.lora_plus_ratio=16"],
        ["--adapter.freeze_a=true"],
    ),
    "reward-needs-rewards": (
        [TASK, "--evaluate.metrics=[reward]"],
        [TASK, "--evaluate.metrics=[reward]", "--evaluate.rewards=reward.py"],
    ),
    "models-are-no-metric": (
        [TASK, "--evaluate.metrics=[reward]", "--evaluate.rewards=[{kind: model, path: runs/reward}]"],
        [TASK, "--evaluate.metrics=[reward]", "--evaluate.rewards=[{kind: number}]"],
    ),
    "rewards-are-possible": (
        ["--objective=grpo", "--objective.rewards=[{kind: length, low: 5, high: 4}]"],
        ["--objective=grpo", "--objective.rewards=[{kind: length, low: 4, high: 4}, {kind: format, pattern: a.b}]"],
    ),
    "minibatches-fill-an-iteration": (
        ["--objective=grpo", REWARD, "--train.global_batch_size=48"],
        ["--objective=grpo", REWARD, "--train.global_batch_size=64"],
    ),
    "groups-have-two": (
        ["--objective=grpo", REWARD, "--objective.num_generations=1"],
        ["--objective=reinforce", REWARD, "--train.global_batch_size=16"],
    ),
    "sampled-objectives-need-no-dropout": (
        ["--objective=grpo", REWARD, "--adapter.dropout=.1"],
        ["--objective=grpo", REWARD],
    ),
    "policies-sample-the-full-support": (
        ["--objective=grpo", REWARD, "--objective.rollout.top_p=.9"],
        ["--objective=raft", REWARD, "--objective.rollout.top_p=.9"],
    ),
    "k1-has-no-gradient": (
        ["--objective=grpo", REWARD, "--objective.kl.estimator=k1"],
        ["--objective=grpo", REWARD, "--objective.kl.estimator=k2", "--objective.kl.level=answer"],
    ),
    "budget-needs-a-weight": (
        ["--objective=grpo", REWARD, "--objective.preset=dapo", "--objective.kl.budget=8"],
        ["--objective=ppo", REWARD, "--objective.kl.budget=8"],
    ),
    "scaled-rewards-keep-the-divergence-apart": (
        ["--objective=rloo", REWARD, "--objective.combine=normalize_then_sum"],
        [
            *("--objective=rloo", REWARD, "--objective.combine=normalize_then_sum"),
            *("--objective.kl.place=loss", "--objective.kl.estimator=k2"),
        ],
    ),
    "policies-with-reference-need-an-adapter": (
        ["--objective=grpo", REWARD, "--adapter=none"],
        ["--objective=grpo", REWARD, "--adapter=none", "--objective.kl.place=none"],
    ),
    "reinforce-learns-once": (
        ["--objective=reinforce", REWARD, "--objective.num_passes=2"],
        ["--objective=reinforce", REWARD, "--objective.num_passes=2", "--objective.importance=token"],
    ),
    "distillation-mixes-nothing": (
        ["--objective=distill", "--objective.teacher=t", "--objective.on_policy_share=.5"],
        ["--objective=distill", "--objective.teacher=t", "--objective.on_policy_share=0"],
    ),
    "values-need-an-adapter": (
        ["--objective=ppo", REWARD, "--adapter=none", "--objective.kl.place=none"],
        ["--objective=ppo", REWARD, "--adapter=none", "--objective.kl.place=none", "--objective.value.trunk=policy"],
    ),
    "values-of-the-policy-begin-anew": (
        ["--objective=ppo", REWARD, "--objective.value={trunk: policy, path: r}"],
        ["--objective=ppo", REWARD, "--objective.value={trunk: adapter, path: r}"],
    ),
    "tdpo-needs-an-adapter": (
        ["--objective=dpo", "--objective.loss=tdpo2", "--adapter=none"],
        ["--objective=dpo", "--objective.loss=tdpo2"],
    ),
    "distillation-answers-once": (
        ["--objective=distill", "--objective.teacher=t", "--objective.num_generations=2"],
        ["--objective=distill", "--objective.teacher=t"],
    ),
    "local-models-have-no-revision": (["--model.id=here", "--model.revision=main"], ["--model.revision=main"]),
    "foreign-code-is-pinned": (
        ["--model.trust_remote_code=true"],
        ["--model.trust_remote_code=true", "--model.revision=abc"],
    ),
    "metrics-once": ([TASK, "--evaluate.metrics=[bleu, bleu]"], [TASK, "--evaluate.metrics=[bleu]"]),
    "pattern-is-a-regex": (
        [TASK, "--evaluate.metrics=exact_match", "--evaluate.answer_pattern='(a'"],
        [TASK, "--evaluate.metrics=exact_match", "--evaluate.answer_pattern='(a)'"],
    ),
    "pattern-has-a-group": (
        [TASK, "--evaluate.metrics=exact_match", "--evaluate.answer_pattern=a+"],
        [TASK, "--evaluate.metrics=exact_match", "--evaluate.answer_pattern=(a+)"],
    ),
    "pattern-needs-exact-match": (
        [TASK, "--evaluate.answer_pattern=(a)"],
        [TASK, "--evaluate.answer_pattern=(a)", "--evaluate.metrics=[bleu, exact_match]"],
    ),
    "top-p-needs-temperature": (
        [TASK, "--evaluate.top_p=.9"],
        [TASK, "--evaluate.top_p=.9", "--evaluate.temperature=1"],
    ),
    "stop-is-not-empty": ([TASK, "--evaluate.stop=['']"], [TASK, "--evaluate.stop=['#']"]),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()


def test_every_rule_is_tested() -> None:
    assert VIOLATIONS.keys() == {rule.name for rule in (*RUN_RULES, *TASK_RULES)}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_reported_with_its_fix(name: str) -> None:
    flags, valid = VIOLATIONS[name]
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*START, *flags])
    rule = next(rule for rule in (*RUN_RULES, *TASK_RULES) if rule.name == name)
    first = rule.where.split(", ")[0]
    assert first in str(caught.value) and "fix" in str(caught.value)
    load_run(None, [*START, *valid])


def test_a_fix_has_the_path_of_the_task_and_keeps_values_unchanged() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*START, TASK, "--evaluate.stop=['', '--stop=x']", "--evaluate.top_p=.5"])
    text = str(caught.value)
    assert "--evaluate.stop=['--stop=x']" in text
    assert "--evaluate.temperature=0.7 or --evaluate.top_p=1" in text
    with pytest.raises(ConfigError, match="fix    --temperature="):
        check(TaskConfig.model_validate({"sources": "a", "top_p": 0.5}))


def test_all_violations_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*START, "--parallel.shard_size=2", "--adapter=none", "--base=nf4", TASK, "--evaluate.top_p=.5"])
    text = str(caught.value)
    assert text.startswith("The config has 3 problems.")
    assert "--parallel.kind=hsdp" in text and "--evaluate.temperature=0.7" in text


def test_runs_built_in_python_are_checked() -> None:
    run = Run.model_validate(
        {"model": {"id": "m"}, "base": "nf4", "adapter": "none", "data": {"sources": "a"}, "output": "o"}
    )
    with pytest.raises(ConfigError, match="Full fine-tuning needs unquantized weights"):
        check(run)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("{kind: overlong, max: 8, buffer: 9}", "over 9 tokens before the token 8"),
        ("{kind: format, pattern: '('}", "not a regular expression"),
        ("{kind: judge, url: 'ftp://x', model: m, prompt: p}", "not the address"),
        ("{kind: judge, url: 'http://x:99999999/v1', model: m, prompt: p}", "not the address"),
        ("{kind: judge, url: 'http://x/v1', model: m, prompt: p, scale: [10, 1]}", "No grade lies"),
    ],
)
def test_an_impossible_reward_is_named_with_its_number(reward: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_run(None, [*START, "--objective=grpo", f"--objective.rewards=[{{kind: number}}, {reward}]"])
    assert "Reward 2 (" in str(caught.value) and "--objective.rewards.1." in str(caught.value)
