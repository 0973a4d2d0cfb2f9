"""The training core in one process: packing, attention, sharded loading, TRL as the oracle."""

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
from calm_ray.prompts.rendering import encode_dialogue
from calm_ray.run.policies import Policy, RunModel, publish
from calm_ray.run.stage import Stage
from calm_ray.run.storage import Storage
from calm_ray.testing import word_tokenizer, write_tiny_model
from calm_ray.training.batches import PackedBatch, pack
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
    return Train(**{"learning_rate": 1e-3, "warmup_share": 0.0, "dtype": "float32", "lora": LORA, **changes})


def examples(count: int = 6, seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 90) for _ in range(rng.randint(low, high))]

    return [
        tree(tokens(2, 9), [*tokens(1, 12), 1], [*tokens(1, 12), 1], question_id=f"q{number}")
        for number in range(count)
    ]


def loaded(folder: Path, train: Train, policy: Policy = Policy(), seed: int = 0) -> PolicyModel:  # noqa: B008
    model = PolicyModel(folder, train, CPU)
    model.load(policy, seed)
    return model


def by_hand(folder: Path, rows: list[Tree]) -> torch.Tensor:
    """Log-probabilities from transformers alone, one sequence at a time, without packing or chunks."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt, side in ((row.prompt, branch.tokens) for row in rows for branch in row.branches):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + side])).logits[0].log_softmax(-1)
        found.append(sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(side)))
    return torch.tensor(found)


def trainer_of(
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
    """The batch's loss, whose gradient is added."""
    return trainer.metrics_of(trainer.forward_backward(rows), "train")["train/loss"]


def chosen_side(row: Tree) -> Tree:
    return replace(row, branches=row.branches[:1], comparisons=())


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_packed_scores_are_those_of_single_sequences(folder: Path, attention: str) -> None:
    rows = examples()
    model = loaded(folder, settings(attention=attention))
    packed = model.logps(pack(rows))
    assert torch.allclose(packed, by_hand(folder, rows), rtol=1e-5, atol=1e-4)


def test_packed_is_unpacked(folder: Path, tmp_path: Path) -> None:
    rows = examples(8)
    losses, gradients = [], []
    for limit in (1, 60, 10_000):
        train = settings(pack_tokens=limit, sft_weight=0.5)
        model = loaded(folder, train)
        trainer = trainer_of(model, folder, tmp_path, train)
        trainer.ref_logps = trainer.reference_logps(rows)
        losses.append(loss_of(trainer, rows))
        gradients.append(torch.cat([p.grad.flatten() for p in model.trainable() if p.grad is not None]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
    for other in gradients[1:]:
        assert torch.linalg.norm(other - gradients[0]) <= 1e-5 * torch.linalg.norm(gradients[0])


def test_a_fresh_adapter_changes_nothing_and_the_first_loss_is_ln_2(folder: Path, tmp_path: Path) -> None:
    train = settings()
    model = loaded(folder, train)
    trainer = trainer_of(model, folder, tmp_path, train)
    rows = examples()
    trainer.ref_logps = trainer.reference_logps(rows)
    assert loss_of(trainer, rows) == pytest.approx(0.6931472, abs=1e-4)
    with model.without_adapter():
        assert torch.equal(model.logps(pack(rows)), loaded(folder, train, seed=5).logps(pack(rows)))


def published(model: PolicyModel, folder: Path, kind: Literal["adapter", "weights"]) -> Policy:
    model.save(folder)
    return publish(folder, Storage(str(folder.parent / "storage")), "policy", 1, kind)


def train_a_little(model: PolicyModel, rows: list[Tree], steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-2)
    for _ in range(steps):
        (-model.logps(pack(rows)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_are_pefts_and_come_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows = examples()
    model = loaded(folder, settings())
    train_a_little(model, rows)
    trained = model.logps(pack(rows)).detach()
    policy = published(model, tmp_path / "adapter", "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip
    again = loaded(folder, settings(), policy)
    assert torch.allclose(again.logps(pack(rows)), trained, atol=1e-5)
    with again.without_adapter():
        assert torch.allclose(again.logps(pack(rows)), by_hand(folder, rows), atol=1e-4)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "adapter"))
    merged = tmp_path / "merged"
    peft_model.merge_and_unload().save_pretrained(merged)
    assert torch.allclose(by_hand(merged, rows), trained, atol=1e-3)


def test_all_weights_are_saved_and_come_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows = examples()
    full = settings(lora=None)
    model = loaded(folder, full)
    train_a_little(model, rows)
    trained = model.logps(pack(rows)).detach()
    policy = published(model, tmp_path / "weights", "weights")
    assert torch.allclose(by_hand(tmp_path / "weights", rows), trained, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "weights").eos_token_id == 1
    assert torch.allclose(loaded(folder, full, policy).logps(pack(rows)), trained, atol=1e-5)


def begun_from_other_weights(folder: Path, tmp_path: Path, full: Train, rows: list[Tree]) -> Trainer:
    """A trainer as round two has it: margins from the base model, then the weights in tmp_path / "start"."""
    model = loaded(folder, full)
    train_a_little(model, rows)
    start = published(model, tmp_path / "start", "weights")
    model = PolicyModel(folder, full, CPU)
    trainer = trainer_of(model, folder, tmp_path, full)
    trainer.ref_logps = trainer.reference_logps(rows)
    model.load(start, 0)
    return trainer


def test_the_reference_of_full_fine_tuning_is_loaded_not_assumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round two starts from other weights than its reference: step one is not ln 2, but what the margins say."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, full = examples(), settings(lora=None)
    trainer = begun_from_other_weights(folder, tmp_path, full, rows)
    loss = loss_of(trainer, rows)
    policy, reference = by_hand(tmp_path / "start", rows), by_hand(folder, rows)
    margins = (policy[0::2] - policy[1::2]) - (reference[0::2] - reference[1::2])
    assert loss == pytest.approx(float(-torch.nn.functional.logsigmoid(0.1 * margins).mean()), rel=1e-4)
    assert abs(loss - 0.6931) > 1e-3


def test_full_fine_tuning_moves_every_weight_from_where_the_round_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Margins come first, from other weights: neither they nor FSDP's gathered copies may be what is trained."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, full = examples(), settings(lora=None, learning_rate=1e-6, epochs=1, batch_pairs=2)
    trainer = begun_from_other_weights(folder, tmp_path, full, rows)
    trainer.fit(rows, [], 0)
    trainer.policy_model.save(tmp_path / "trained")
    before, after = load_weights(tmp_path / "start"), load_weights(tmp_path / "trained")
    for name, weights in before.items():
        moved = float((after[name] - weights).abs().max())
        assert 0 < moved < 1e-4, f"{name} moved by {moved}"


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def trls_trainer(folder: Path, rows: list[Tree], beta: float, output: Path) -> DPOTrainer:
    """TRL's trainer on the same pairs as text, with a new adapter; its reference is the adapter switched off."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns: dict[str, Any] = {
        "prompt": [row.prompt for row in rows],
        "chosen": [row.branches[0].tokens[:-1] for row in rows],
    }
    columns["rejected"] = [row.branches[1].tokens[:-1] for row in rows]
    space = {"prompt": "", "chosen": " ", "rejected": " "}
    texts = {name: [space[name] + str(tokenizer.decode(ids)) for ids in column] for name, column in columns.items()}
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


def test_loss_and_gradients_are_trls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch, policy and reference in TRL's DPOTrainer, which knows nothing of ours."""
    monkeypatch.setenv("CALM_RAY_CACHE", str(tmp_path / "cache"))
    rows, train = examples(8), settings(beta=0.3)
    ours = loaded(folder, train)
    train_a_little(ours, rows, steps=2)  # so that the policy is not its reference
    policy = published(ours, tmp_path / "start", "adapter")
    trainer = trainer_of(ours, folder, tmp_path, train)
    trainer.ref_logps = trainer.reference_logps(rows)
    ours.load(policy, 0)
    loss = loss_of(trainer, rows)

    theirs = trls_trainer(folder, rows, 0.3, tmp_path / "trl")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    adapter = {n.replace(".default.", "."): p for n, p in theirs.model.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(start[name])
    their_loss = theirs._compute_loss(theirs.model, next(iter(theirs.get_train_dataloader())), return_outputs=False)
    their_loss.backward()
    assert loss == pytest.approx(their_loss.item(), rel=1e-4)
    assert loss != pytest.approx(0.6931, rel=1e-3)
    for name, parameter in ours.adapter_parameters():
        mine, other = parameter.grad.full_tensor(), adapter[name].grad  # type: ignore[union-attr]
        assert torch.linalg.norm(mine - other) <= 1e-4 * torch.linalg.norm(other)


def test_sliding_windows_are_kept() -> None:
    from calm_ray.training.attention import varlen_attention

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
    trainer = trainer_of(loaded(folder, train), folder, tmp_path, train, objective=SFT())
    rows = examples()
    first = loss_of(trainer, [chosen_side(row) for row in rows])
    scores = by_hand(folder, rows)[0::2]
    assert first == pytest.approx(
        float(-(scores / torch.tensor([len(row.branches[0].tokens) for row in rows])).mean()), rel=1e-5
    )


CHAT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w1 "
    "{% generation %}{{ message['content'] }} <eos> {% endgeneration %}"
    "{% else %}w2 {{ message['content'] }} {% endif %}{% endfor %}"
)


def dialogues() -> list[list[dict[str, str]]]:
    """Of one, two and three turns of the assistant, of unlike lengths."""
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


def test_a_dialogues_loss_by_token_is_trls(chat_folder: Path, tmp_path: Path) -> None:
    """TRL's SFTTrainer with assistant-only loss on the same messages, which knows nothing of ours."""
    train = settings(lora=None)
    trainer = trainer_of(loaded(chat_folder, train), chat_folder, tmp_path, train, SFT("token"))
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


def test_a_dialogues_loss_by_row_is_the_mean_of_its_rows_alone(chat_folder: Path, tmp_path: Path) -> None:
    train = settings()
    rows = dialogue_trees(chat_folder)
    trainer = trainer_of(loaded(chat_folder, train), chat_folder, tmp_path, train, SFT("row"))
    alone = [loss_of(trainer, [row]) for row in rows]
    assert loss_of(trainer, rows) == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    by_token = trainer_of(loaded(chat_folder, train), chat_folder, tmp_path, train, SFT("token"))
    assert loss_of(by_token, rows) != pytest.approx(sum(alone) / len(alone), abs=1e-3)


def test_a_template_without_marks_is_refused() -> None:
    with pytest.raises(InputError, match="generation"):
        encode_dialogue(word_tokenizer(["a"], "{{ messages[0]['content'] }}"), [{"role": "user", "content": "a"}])


def test_packed_batches_move_between_devices() -> None:
    batch = pack(examples(2))
    assert isinstance(batch.to(CPU), PackedBatch)
    assert batch.to(CPU).longest == batch.longest
