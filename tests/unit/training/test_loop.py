"""The training loop in one process: packing, attention, loading and saving, and losses compared with TRL's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from factories import tree
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from calm_ray.core.errors import InputError
from calm_ray.core.rows import Dialogue
from calm_ray.core.sections import Lora, Train
from calm_ray.packing.batch import PackedBatch, pack
from calm_ray.prompts.rendering import encode_dialogue
from calm_ray.run.policies import Policy, RunModel, publish
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training import loop
from calm_ray.training.job import TrainJob
from calm_ray.training.loop import Trainer
from calm_ray.training.model import PolicyModel
from calm_ray.training.objectives import DPO, SFT, Objective
from calm_ray.training.trees import Tree, tree_of_dialogue

CPU = torch.device("cpu")
LORA = Lora(r=8, alpha=16, targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = word_tokenizer([f"w{i}" for i in range(90)])
    return write_tiny_model(tmp_path_factory.mktemp("model"), tokenizer, tied=request.param)


def settings(**changes: Any) -> Train:
    return Train(**{"learning_rate": 1e-3, "warmup_ratio": 0.0, "dtype": "float32", "lora": LORA, **changes})


def random_trees(count: int = 6, seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 90) for _ in range(rng.randint(low, high))]

    return [
        tree(tokens(2, 9), [*tokens(1, 12), 1], [*tokens(1, 12), 1], question_id=f"q{number}")
        for number in range(count)
    ]


def load_model(folder: Path, train: Train, policy: Policy = Policy(), seed: int = 0) -> PolicyModel:  # noqa: B008
    model = PolicyModel(folder, train, CPU)
    model.load(policy, seed)
    return model


def plain_logps(folder: Path, rows: list[Tree]) -> torch.Tensor:
    """Log-probabilities from plain transformers, one sequence at a time, without packing or chunking."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt, side in ((row.prompt, branch.tokens) for row in rows for branch in row.branches):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + side])).logits[0].log_softmax(-1)
        found.append(sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(side)))
    return torch.tensor(found)


def make_trainer(
    model: PolicyModel, folder: Path, storage: Path, train: Train, objective: Objective | None = None
) -> Trainer:
    stage = Stage(Storage(str(storage)))
    job = TrainJob(
        stage,
        stage,
        RunModel(str(folder)),
        Policy(),
        Policy(),
        train,
        objective or DPO(train.beta, train.sft_weight),
        0,
        1,
    )
    return Trainer(job, model, lambda row: None)


def loss_of(trainer: Trainer, rows: list[Tree]) -> float:
    """The batch's loss; its gradient is accumulated."""
    return trainer.metrics_of(trainer.forward_backward(rows), "train")["train/loss"]


def chosen_only(row: Tree) -> Tree:
    return replace(row, branches=row.branches[:1], comparisons=())


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_packed_logps_match_single_sequences(folder: Path, attention: str) -> None:
    rows = random_trees()
    model = load_model(folder, settings(attention=attention))
    packed = model.logps(pack(rows))
    assert torch.allclose(packed, plain_logps(folder, rows), rtol=1e-5, atol=1e-4)


def test_pack_size_does_not_change_loss_or_gradients(folder: Path, tmp_path: Path) -> None:
    rows = random_trees(8)
    losses, gradients = [], []
    for limit in (1, 60, 10_000):
        train = settings(pack_tokens=limit, sft_weight=0.5)
        model = load_model(folder, train)
        trainer = make_trainer(model, folder, tmp_path, train)
        trainer.ref_logps = trainer.reference_logps(rows)
        losses.append(loss_of(trainer, rows))
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable() if p.grad is not None]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    for other in gradients[1:]:
        assert torch.linalg.norm(other - gradients[0]) <= 1e-5 * torch.linalg.norm(gradients[0])


def test_shared_prompts_do_not_change_loss_or_gradients(folder: Path, tmp_path: Path) -> None:
    rows = [*random_trees(4), tree([5, 6, 7], [8, 1], [9, 9, 1], question_id="q9")]
    losses, gradients = [], []
    for shares in (True, False):
        train = settings(sft_weight=0.5)
        model = load_model(folder, train)
        assert model._shares_prompts
        model._shares_prompts = shares
        trainer = make_trainer(model, folder, tmp_path / str(shares), train)
        trainer.ref_logps = trainer.reference_logps(rows)
        losses.append(loss_of(trainer, rows))
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.linalg.norm(gradients[0] - gradients[1]) <= 1e-5 * torch.linalg.norm(gradients[1])


def test_new_adapter_changes_nothing_and_first_loss_is_ln_2(folder: Path, tmp_path: Path) -> None:
    train = settings()
    model = load_model(folder, train)
    trainer = make_trainer(model, folder, tmp_path, train)
    rows = random_trees()
    trainer.ref_logps = trainer.reference_logps(rows)
    assert loss_of(trainer, rows) == pytest.approx(0.6931472, abs=1e-4)
    with model.without_adapter():
        assert torch.equal(model.logps(pack(rows)), load_model(folder, train, seed=5).logps(pack(rows)))


def save_and_publish(model: PolicyModel, folder: Path, kind: Literal["adapter", "weights"]) -> Policy:
    model.save(folder)
    return publish(folder, Storage(str(folder.parent / "storage")), "policy", 1, kind)


def train_briefly(model: PolicyModel, rows: list[Tree], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-2)
    for _ in range(steps):
        (-model.logps(pack(rows)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_round_trip_and_load_in_peft(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows = random_trees()
    model = load_model(folder, settings())
    train_briefly(model, rows)
    trained = model.logps(pack(rows)).detach()
    policy = save_and_publish(model, tmp_path / "adapter", "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    again = load_model(folder, settings(), policy)
    assert torch.allclose(again.logps(pack(rows)), trained, atol=1e-5)
    with again.without_adapter():
        assert torch.allclose(again.logps(pack(rows)), plain_logps(folder, rows), atol=1e-4)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    merged = tmp_path / "merged"
    peft_model.merge_and_unload().save_pretrained(merged)
    assert torch.allclose(plain_logps(merged, rows), trained, atol=1e-3)


def test_full_weights_round_trip(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows = random_trees()
    full = settings(lora=None)
    model = load_model(folder, full)
    train_briefly(model, rows)
    trained = model.logps(pack(rows)).detach()
    policy = save_and_publish(model, tmp_path / "weights", "weights")
    assert torch.allclose(plain_logps(tmp_path / "weights", rows), trained, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "weights").eos_token_id == 1
    assert torch.allclose(load_model(folder, full, policy).logps(pack(rows)), trained, atol=1e-5)


def round_two_trainer(folder: Path, tmp_path: Path, full: Train, rows: list[Tree]) -> Trainer:
    """A trainer in round two: margins from the base model, then the weights in tmp_path / "start"."""
    model = load_model(folder, full)
    train_briefly(model, rows)
    start = save_and_publish(model, tmp_path / "start", "weights")
    model = PolicyModel(folder, full, CPU)
    trainer = make_trainer(model, folder, tmp_path, full)
    trainer.ref_logps = trainer.reference_logps(rows)
    model.load(start, 0)
    return trainer


def test_reference_logps_report_progress(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0.0)
    train, rows = settings(pack_tokens=30), random_trees(12)
    trainer = make_trainer(load_model(folder, train), folder, tmp_path, train)
    reported: list[dict[str, Any]] = []
    trainer.report = reported.append
    trainer.reference_logps(rows)
    done = [row["reference"] for row in reported]
    assert done[0] == 0
    assert done[-1] == 12
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert {row["total"] for row in reported} == {12}


def test_full_fine_tuning_loads_its_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round two does not start at its reference: the first loss is not ln 2 but follows from the margins."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, full = random_trees(), settings(lora=None)
    trainer = round_two_trainer(folder, tmp_path, full, rows)
    loss = loss_of(trainer, rows)
    policy, reference = plain_logps(tmp_path / "start", rows), plain_logps(folder, rows)
    margins = (policy[0::2] - policy[1::2]) - (reference[0::2] - reference[1::2])
    assert loss == pytest.approx(float(-torch.nn.functional.logsigmoid(0.1 * margins).mean()), rel=1e-4)
    assert abs(loss - 0.6931) > 1e-3


def test_full_fine_tuning_trains_the_start_of_the_round(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins are computed first, with other weights: neither those nor FSDP's gathered copies may be trained."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, full = random_trees(), settings(lora=None, learning_rate=1e-6, epochs=1, batch_pairs=2)
    trainer = round_two_trainer(folder, tmp_path, full, rows)
    trainer.fit(rows, [], 0)
    trainer.policy_model.save(tmp_path / "trained")
    before, after = load_weights(tmp_path / "start"), load_weights(tmp_path / "trained")
    for name, weights in before.items():
        moved = float((after[name] - weights).abs().max())
        assert 0 < moved < 1e-4, f"{name} moved by {moved}"


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def trl_trainer(folder: Path, rows: list[Tree], beta: float, output: Path) -> DPOTrainer:
    """TRL's trainer on the same pairs as text, with a new adapter; the model without it is the reference."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns: dict[str, Any] = {
        "prompt": [row.prompt for row in rows],
        "chosen": [row.branches[0].tokens[:-1] for row in rows],
    }
    columns["rejected"] = [row.branches[1].tokens[:-1] for row in rows]
    prefix = {"prompt": "", "chosen": " ", "rejected": " "}
    texts = {name: [prefix[name] + str(tokenizer.decode(ids)) for ids in column] for name, column in columns.items()}
    arguments = DPOConfig(
        output_dir=str(output), beta=beta, per_device_train_batch_size=len(rows),
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=Dataset.from_dict(texts),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LORA.targets, task_type="CAUSAL_LM"),
    )


def test_loss_and_gradients_match_trl(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's independent DPOTrainer gets the same batch, policy and reference."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, train = random_trees(8), settings(beta=0.3)
    ours = load_model(folder, train)
    train_briefly(ours, rows, steps=2)  # so that the policy differs from its reference
    policy = save_and_publish(ours, tmp_path / "start", "adapter")
    trainer = make_trainer(ours, folder, tmp_path, train)
    trainer.ref_logps = trainer.reference_logps(rows)
    ours.load(policy, 0)
    loss = loss_of(trainer, rows)

    theirs = trl_trainer(folder, rows, 0.3, tmp_path / "trl")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    adapter = {n.replace(".default.", "."): p for n, p in theirs.model.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(start[name])
    trl_loss = theirs._compute_loss(theirs.model, next(iter(theirs.get_train_dataloader())), return_outputs=False)
    trl_loss.backward()
    assert loss == pytest.approx(trl_loss.item(), rel=1e-4)
    assert loss != pytest.approx(0.6931, rel=1e-3)
    for name, parameter in ours.adapter_parameters():
        mine, other = parameter.grad.full_tensor(), adapter[name].grad  # type: ignore[union-attr]
        assert torch.linalg.norm(mine - other) <= 1e-4 * torch.linalg.norm(other)


def test_varlen_attention_respects_sliding_windows() -> None:
    from calm_ray.packing.attention import varlen_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    boundaries = torch.tensor([0, 6, 9], dtype=torch.int32)
    module = torch.nn.Module()
    out, _ = varlen_attention(
        module, q, k, v, None, cu_seq_lens_q=boundaries, max_length_q=6, sliding_window=2, scaling=0.5
    )
    # The last token of the first sequence sees itself and the one before, nothing else.
    scores = torch.einsum("hd,htd->ht", q[0, :, 5], k[0].repeat_interleave(2, 0)[:, 4:6]) * 0.5
    expected = torch.einsum("ht,htd->hd", scores.softmax(-1), v[0].repeat_interleave(2, 0)[:, 4:6])
    assert torch.allclose(out[0, 5], expected, atol=1e-6)
    with pytest.raises(ValueError, match="eager"):
        varlen_attention(module, q, k, v, None, cu_seq_lens_q=boundaries, max_length_q=6, softcap=30.0)


def test_sft_sees_only_the_chosen_side(folder: Path, tmp_path: Path) -> None:
    train = settings()
    trainer = make_trainer(load_model(folder, train), folder, tmp_path, train, objective=SFT())
    rows = random_trees()
    first = loss_of(trainer, [chosen_only(row) for row in rows])
    scores = plain_logps(folder, rows)[0::2]
    assert first == pytest.approx(
        float(-(scores / torch.tensor([len(row.branches[0].tokens) for row in rows])).mean()), rel=1e-5
    )


CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w1 "
    "{% generation %}{{ message['content'] }} <eos> {% endgeneration %}"
    "{% else %}w2 {{ message['content'] }} {% endif %}{% endfor %}"
)


def dialogues() -> list[list[dict[str, str]]]:
    """Dialogues with one to three assistant turns of different lengths."""
    rng = random.Random(0)

    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(f"w{rng.randrange(3, 90)}" for _ in range(rng.randint(1, 9)))}

    return [[turn(role) for _ in range(turns) for role in ("user", "assistant")] for turns in (1, 2, 3, 2)]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = word_tokenizer([f"w{i}" for i in range(90)], CHAT)
    return write_tiny_model(tmp_path_factory.mktemp("chat"), tokenizer)


def dialogue_trees(folder: Path) -> list[Tree]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for number, messages in enumerate(dialogues()):
        ids, scored = encode_dialogue(tokenizer, messages)
        row = Dialogue(question_id=f"q{number}", language="en", number=0, token_ids=ids, scored=scored)
        found.append(tree_of_dialogue(row))
    return found


def test_dialogue_loss_by_token_matches_trl(chat_folder: Path, tmp_path: Path) -> None:
    """TRL's independent SFTTrainer gets the same messages, with assistant-only loss."""
    train = settings(lora=None)
    trainer = make_trainer(load_model(chat_folder, train), chat_folder, tmp_path, train, SFT("token"))
    rows = dialogue_trees(chat_folder)
    ours = loss_of(trainer, rows)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"), assistant_only_loss=True, per_device_train_batch_size=len(rows),
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(chat_folder),
        args=arguments,
        train_dataset=Dataset.from_dict({"messages": dialogues()}),
        processing_class=AutoTokenizer.from_pretrained(chat_folder),
    )
    batch = next(iter(theirs.get_train_dataloader()))
    assert int((batch["labels"] != -100).sum()) == sum(row.branches[0].scored_tokens for row in rows)
    assert ours == pytest.approx(theirs.compute_loss(theirs.model, batch).item(), abs=1e-5)


def test_dialogue_loss_by_row_averages_the_losses_of_single_rows(chat_folder: Path, tmp_path: Path) -> None:
    train = settings()
    rows = dialogue_trees(chat_folder)
    trainer = make_trainer(load_model(chat_folder, train), chat_folder, tmp_path, train, SFT("row"))
    alone = [loss_of(trainer, [row]) for row in rows]
    assert loss_of(trainer, rows) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    by_token = make_trainer(load_model(chat_folder, train), chat_folder, tmp_path, train, SFT("token"))
    assert loss_of(by_token, rows) != pytest.approx(sum(alone) / len(alone), abs=1e-3)


def test_chat_template_without_generation_tags_is_rejected() -> None:
    with pytest.raises(InputError, match="generation"):
        encode_dialogue(word_tokenizer(["a"], "{{ messages[0]['content'] }}"), [{"role": "user", "content": "a"}])


def test_packed_batches_move_between_devices() -> None:
    batch = pack(random_trees(2))
    assert isinstance(batch.to(CPU), PackedBatch)
    assert batch.to(CPU).longest == batch.longest
