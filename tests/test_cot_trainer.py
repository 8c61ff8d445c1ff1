"""GuidanceGRPOTrainer: with uniform credit it is TRL's trainer; credit, negative prompts, gold answers, ratios of answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from gcpo_t2i.algo.credit import CreditSettings, guidance_credit
from gcpo_t2i.cot import GuidanceGRPOConfig, GuidanceGRPOTrainer
from gcpo_t2i.cot.gold import Generated, to_replace
from tests.tiny_text import ANSWER_LENGTH, conversations, even_ids, settings, tiny_text_model


def trainer_of(kind: type, config: type, folder, data=None, reward=even_ids, **others: Any) -> Any:
    model, tokenizer = tiny_text_model()
    args = config(**settings(folder, **others))
    return kind(model, reward, args, data or conversations(), processing_class=tokenizer)


def guided(folder, **others: Any) -> GuidanceGRPOTrainer:
    return trainer_of(GuidanceGRPOTrainer, GuidanceGRPOConfig, folder, **others)


def rollout(trainer: GuidanceGRPOTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and the tensors of one rollout, before they are shuffled."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    return rows, trainer._generate_and_score_completions(rows)


# --- uniform credit is TRL ------------------------------------------------------------------------------------------


WHOLE = {"max_steps": 4}
# Two updates with each half of a rollout, in three micro-batches of two answers: shuffled, split, accumulated.
IN_PARTS = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "steps_per_generation": 6,
}


@pytest.mark.parametrize("batches", [WHOLE, IN_PARTS], ids=["whole", "in parts"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_uniform_credit_is_trl_bit_for_bit(tmp_path, loss_type, batches):
    """Two updates of each of two rollouts, so that ratios leave 1. With SGD equal weights after a step are equal gradients."""
    same = {"loss_type": loss_type, "num_iterations": 2, "epsilon": 0.05, **batches}
    theirs = trainer_of(GRPOTrainer, GRPOConfig, tmp_path, **same)
    theirs.train()
    ours = guided(tmp_path, credit="uniform", **same)  # sets the seed again
    start = {name: value.clone() for name, value in ours.model.named_parameters()}
    ours.train()
    moved = 0.0
    for (name, own), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(own, other), name
        moved += (own - start[name]).abs().sum().item()
    assert moved > 0.1
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == batches["max_steps"]
    clipped = [row["clip_ratio/region_mean"] for row in ours.state.log_history if "loss" in row]
    assert max(clipped) > 0  # ratios did leave 1


def test_guidance_credit_is_not_trl(tmp_path):
    """So the test above can fail."""
    theirs = trainer_of(GRPOTrainer, GRPOConfig, tmp_path)
    theirs.train()
    ours = guided(tmp_path)
    ours.train()
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert any(not torch.equal(own, other) for own, other in pairs)


# --- credit ---------------------------------------------------------------------------------------------------------


def by_hand(trainer: GuidanceGRPOTrainer, prompt: str, answer: list[int]) -> list[float]:
    """log π of each token of an answer after a rendered prompt, one forward pass, without padding or chunks."""
    before = trainer._tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = trainer.model(torch.tensor([before + answer])).logits[0].float()
    logp = logits.log_softmax(dim=-1)
    return [logp[len(before) - 1 + place, token].item() for place, token in enumerate(answer)]


@pytest.mark.parametrize("negative", ["template", "empty", "column", "conversation"])
def test_credit_is_that_of_the_image_side_on_teacher_forced_log_probs(tmp_path, negative):
    """Rendered by hand, and scored one by one: <|user|>QUESTION<|end|><|assistant|>."""
    others = ["Carl has six.", "Dora has ten.", "Gus has five."]
    talks = [[{"role": "user", "content": other}] for other in others]
    questions = [row[0]["content"] for row in conversations()["prompt"]]
    data, said = {
        "template": (conversations(), [f"{question} Give a wrong answer on purpose." for question in questions]),
        "empty": (conversations(), [""] * 3),
        "column": (conversations(other=others), others),
        "conversation": (conversations(other=talks), others),
    }[negative]
    how: dict[str, Any] = {"negative_column": "other"} if "other" in data.column_names else {}
    trainer = guided(tmp_path, data=data, **how, **({"negative_template": ""} if negative == "empty" else {}))
    rows, output = rollout(trainer)
    mask = output["completion_mask"].bool()
    cond, null = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for row in range(len(rows)):
        question = rows[row]["prompt"][0]["content"]
        answer = output["completion_ids"][row][mask[row]].tolist()
        for target, user in ((cond, question), (null, said[questions.index(question)])):
            target[row, : len(answer)] = torch.tensor(by_hand(trainer, f"<|user|>{user}<|end|><|assistant|>", answer))
    assert (cond - null).abs().max() > 0.1
    credit = guidance_credit({"cond_logp": cond, "null_logp": null}, mask, CreditSettings(), [])
    # Advantages by hand: rewards of each group of four, over their own unbiased std.
    ids = [output["completion_ids"][row][mask[row]].tolist() for row in range(12)]
    rewards = torch.tensor(even_ids(ids)).view(3, 4)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(output["advantages"], advantage.view(12, 1) * credit, rtol=1e-4, atol=1e-5)


def test_padding_gets_nothing_and_the_mean_of_an_answer_is_its_advantage(tmp_path):
    _, output = rollout(guided(tmp_path))
    mask = output["completion_mask"].bool()
    assert not mask.all()  # some answers are shorter than others
    assert (output["advantages"][~mask] == 0).all()
    means = output["advantages"].sum(1) / mask.sum(1)
    torch.testing.assert_close(means.view(3, 4).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert (output["advantages"].std(1) > 0).any()


def test_a_negative_prompt_that_is_the_prompt_gives_uniform_credit(tmp_path):
    """b = a: no evidence, so equal credit for all."""
    _, output = rollout(guided(tmp_path, negative_template="{question}"))
    mask = output["completion_mask"].bool()
    first = output["advantages"][:, :1].expand_as(mask)
    # the two passes have other lengths of padding, hence not bit for bit; ranks of rounding errors would be far off
    torch.testing.assert_close(output["advantages"], torch.where(mask, first, 0.0), rtol=1e-5, atol=1e-6)


def test_random_credit_has_the_weights_of_guidance_in_other_places(tmp_path):
    _, guidance = rollout(guided(tmp_path / "a"))
    _, shuffled = rollout(guided(tmp_path / "b", credit="random"))
    assert torch.equal(guidance["completion_ids"], shuffled["completion_ids"])
    weights = [one["advantages"].sort(dim=1).values for one in (guidance, shuffled)]
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(guidance["advantages"], shuffled["advantages"])


def test_entropy_credit_needs_no_negative_prompt(tmp_path, monkeypatch):
    trainer = guided(tmp_path, credit="entropy")
    monkeypatch.setattr(trainer, "_negative_ids", None)
    _, output = rollout(trainer)
    assert (output["advantages"].std(1) > 0).any()


# --- one ratio for each answer --------------------------------------------------------------------------------------


def loss_and_gradient(trainer: GuidanceGRPOTrainer, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    return loss.item(), gradient


def batch_with_old(trainer: GuidanceGRPOTrainer) -> dict[str, Any]:
    """A rollout whose old log-probs are off by a number for each answer and a bit for each token: ratios leave 1."""
    _, output = rollout(trainer)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, ANSWER_LENGTH)[0]
    gap = torch.linspace(-0.05, 0.05, 12)[:, None] + torch.linspace(-0.02, 0.03, logp.shape[1])
    return {**output, "old_per_token_logps": logp - gap}


def test_uniform_credit_at_sequence_level_has_the_gradient_of_the_token_form(tmp_path):
    """One token form for all credits would do, and does not have TRL's bits."""
    trainer = guided(tmp_path, credit="uniform", importance_sampling_level="sequence", loss_type="grpo", epsilon=0.5)
    inputs = batch_with_old(trainer)
    plain = loss_and_gradient(trainer, inputs)
    trainer.credit = type(trainer.credit)("guidance")  # the switch that _compute_loss reads; advantages stay uniform
    token_form = loss_and_gradient(trainer, inputs)
    assert plain[0] == pytest.approx(token_form[0], abs=1e-6)
    torch.testing.assert_close(plain[1], token_form[1], rtol=1e-4, atol=1e-6)


def test_credit_counts_at_sequence_level(tmp_path):
    """The value of the loss is that of ratios of answers, Σ −s·A over the answers, and gradients differ from uniform ones."""
    trainer = guided(tmp_path, importance_sampling_level="sequence", loss_type="grpo", epsilon=0.5)
    inputs = batch_with_old(trainer)
    loss, gradient = loss_and_gradient(trainer, inputs)
    assert trainer.importance_sampling_level == "sequence" and trainer._open is None
    mask = inputs["completion_mask"]
    gap = torch.linspace(-0.05, 0.05, 12)[:, None] + torch.linspace(-0.02, 0.03, mask.shape[1])
    ratio = ((gap * mask).sum(1) / mask.sum(1)).exp()
    advantage = inputs["advantages"].sum(1) / mask.sum(1)
    assert loss == pytest.approx(-(ratio * advantage).mean().item(), abs=1e-5)
    inputs["advantages"] = advantage[:, None] * mask
    assert not torch.allclose(gradient, loss_and_gradient(trainer, inputs)[1], rtol=1e-3)


# --- gold answers ---------------------------------------------------------------------------------------------------

RIGHT = "two plus three is five. answer: 5"


def says_right(completions: list[Any], **_: Any) -> list[float]:
    """1 for the right answer; what a random model says is wrong, with a reward that tells the worst: by its length."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if text == RIGHT else -len(text) / 1000 for text in texts]


def gold_rollout(folder, golds: list[str | None], reward=says_right, **others: Any):
    data = conversations(gold=golds)
    trainer = guided(folder, data=data, reward=reward, gold_column="gold", max_completion_length=16, **others)
    rows, output = rollout(trainer)
    counts = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("gold/")}
    return trainer, rows, output, counts


def test_gold_takes_the_place_of_the_worst_answer_of_a_failed_group(tmp_path):
    trainer, _, output, counts = gold_rollout(tmp_path, [RIGHT] * 3, credit="uniform")
    assert counts["gold/all_failed"] == 3 and counts["gold/injected"] == 3 and counts["gold/rejected"] == 0
    gold = [*trainer._tokenizer(RIGHT)["input_ids"], trainer._tokenizer.eos_token_id]
    own = rollout(guided(tmp_path / "own", reward=says_right, credit="uniform", max_completion_length=16))[1]
    for group in range(3):
        members = range(group * 4, group * 4 + 4)
        said = [output["completion_ids"][row][output["completion_mask"][row].bool()].tolist() for row in members]
        plain = [own["completion_ids"][row][own["completion_mask"][row].bool()].tolist() for row in members]
        rewards = torch.tensor(
            says_right([[{"content": text}] for text in trainer._tokenizer.batch_decode(plain, True)])
        )
        place = int(rewards.argmin())
        assert said[place] == gold and [ids for ids in said if ids != gold] == plain[:place] + plain[place + 1 :]
        rewards[place] = 1.0
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        torch.testing.assert_close(output["advantages"][group * 4 : group * 4 + 4, 0], expected)


def test_gold_may_be_messages(tmp_path):
    """The conversational form of TRL: the last message is the answer, as it is as a text."""
    data = [[{"role": "assistant", "content": RIGHT}], None, [{"role": "assistant", "content": " "}]]
    *_, output, counts = gold_rollout(tmp_path / "messages", data)
    *_, plain, same = gold_rollout(tmp_path / "texts", [RIGHT, None, " "])
    assert counts == same and counts["gold/injected"] == 1
    assert torch.equal(output["completion_ids"], plain["completion_ids"])
    assert torch.equal(output["advantages"], plain["advantages"])


@pytest.mark.parametrize(
    "gold",
    [5, [{"role": "user", "content": RIGHT}], [{"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}]],
)
def test_gold_that_is_no_answer_names_its_row(tmp_path, gold):
    said = r"train_dataset\[1\]: gold_column 'gold' must be the right answer as a text, or as messages .* got (5|\[\{)"
    with pytest.raises(ValueError, match=said):
        guided(tmp_path, data=conversations(gold=[None, gold, None]), gold_column="gold")


def test_prompts_without_gold_stay_as_they_are_and_are_counted_once(tmp_path, caplog):
    *_, counts = gold_rollout(tmp_path, [RIGHT, None, ""])
    assert counts["gold/all_failed"] == 3 and counts["gold/injected"] == 1
    said = [record.message for record in caplog.records if "'gold'" in record.message]
    assert said == ["2 of 3 prompts have no 'gold'; their groups stay as they are"]


@pytest.mark.parametrize("gold", ["two plus three is six. answer: 6", " ".join(["two"] * 20)])
def test_gold_that_fails_or_is_too_long_is_not_used_and_counted(tmp_path, gold):
    _, _, output, counts = gold_rollout(tmp_path, [gold] * 3)
    own = rollout(guided(tmp_path / "own", reward=says_right, max_completion_length=16))[1]
    assert torch.equal(output["completion_ids"], own["completion_ids"])
    assert torch.equal(output["advantages"], own["advantages"])
    assert counts["gold/injected"] == 0 and counts["gold/rejected"] == 3


def test_a_group_with_a_success_stays(tmp_path):
    def always_right(completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    assert gold_rollout(tmp_path, [RIGHT] * 3, always_right)[3]["gold/all_failed"] == 0


def test_rewards_are_asked_again_only_for_references_and_what_they_log_counts_once(tmp_path):
    calls = []

    def counted(completions: list[Any], log_extra: Any, log_metric: Any, **others: Any) -> list[float]:
        calls.append(len(completions))
        log_extra("own", list(range(len(completions))))
        log_metric("seen", 1.0)
        return says_right(completions)

    trainer, *_ = gold_rollout(tmp_path / "a", [RIGHT] * 3, counted)
    assert calls == [12, 12] and len(trainer._logs["extra"]["own"]) == 12
    calls.clear()
    gold_rollout(tmp_path / "b", [" ".join(["two"] * 20), None, ""], counted)  # the first is too long
    assert calls == [12]


def test_gold_with_sequence_ratio_trains(tmp_path):
    """The recipe of arXiv 2510.07790: one ratio per answer, no KL. The reference becomes likelier."""
    data = conversations(gold=[RIGHT] * 3)
    how = {"importance_sampling_level": "sequence", "credit": "uniform", "gold_column": "gold", "max_steps": 6}
    trainer = guided(tmp_path, data=data, reward=says_right, max_completion_length=16, **how)
    gold = [*trainer._tokenizer(RIGHT)["input_ids"], trainer._tokenizer.eos_token_id]
    asked = f"<|user|>{data[0]['prompt'][0]['content']}<|end|><|assistant|>"
    before = sum(by_hand(trainer, asked, gold))
    trainer.train()
    assert trainer.beta == 0.0
    assert sum(by_hand(trainer, asked, gold)) > before + 1


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"negative_template": "Answer wrongly."}, r"has no \{question\}"),
        ({"credit": "guidence"}, "unknown credit rule 'guidence'; did you mean 'guidance'"),
        ({"credit": "stage"}, "needs advantage, code_vectors, which texts do not have"),
        ({"credit_contrast": "exact_kl"}, "needs exact_kl, which texts do not have"),
        ({"credit_top": 0.9}, "0 < top <= mass < 1"),
        ({"negative_column": "bad"}, "negative_column 'bad' is no column of train_dataset, which has prompt; name one"),
        ({"gold_column": "gold"}, "gold_column 'gold' is no column of train_dataset, which has prompt; name one"),
    ],
)
def test_settings_that_cannot_be(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        guided(tmp_path, **wrong)


def test_plain_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="args is a GRPOConfig; make it a GuidanceGRPOConfig"):
        trainer_of(GuidanceGRPOTrainer, GRPOConfig, tmp_path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ["Carl has six.", None, "Gus has five."],
            r"train_dataset\[1\]: negative_column 'other' is empty; give every row",
        ),
        ([1, 2, 3], r"train_dataset\[0\]: negative_column 'other' must be a text, or messages .*, got 1"),
        (
            [[{"role": "user", "content": "Carl has six."}], [], []],
            r"train_dataset\[1\]: negative_column 'other' is empty",
        ),
    ],
)
def test_cells_of_a_negative_column_that_cannot_be(tmp_path, others, message):
    with pytest.raises(ValueError, match=message):
        guided(tmp_path, data=conversations(other=others), negative_column="other")


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (
            conversations(other=["Carl has six.", "Dora has ten.", ""]),
            r"^eval_dataset\[2\]: negative_column 'other' is",
        ),
        (
            {"hard": conversations()},
            r"negative_column 'other' is no column of eval_dataset\['hard'\], which has prompt",
        ),
    ],
)
def test_negative_columns_of_data_for_evaluation(tmp_path, held_out, message):
    data, (model, tokenizer) = conversations(other=["Carl has six."] * 3), tiny_text_model()
    args = GuidanceGRPOConfig(**settings(tmp_path, negative_column="other"))
    with pytest.raises(ValueError, match=message):
        GuidanceGRPOTrainer(model, even_ids, args, data, eval_dataset=held_out, processing_class=tokenizer)


def test_an_empty_cell_of_a_stream_is_met_when_it_is_drawn(tmp_path):
    data = conversations(other=["Carl has six.", None, "Gus has five."]).to_iterable_dataset()
    trainer = guided(tmp_path, data=data, negative_column="other")
    with pytest.raises(
        ValueError, match=r"^the row of the prompt 'Ben has nine cards\. .*': negative_column 'other' is empty"
    ):
        rollout(trainer)


def test_token_masks_keep_credit_finite_where_an_answer_is_left_out(tmp_path):
    """`mask_truncated_completions` leaves answers without a single token."""
    _, output = rollout(guided(tmp_path, mask_truncated_completions=True))
    assert (output["completion_mask"].sum(1) == 0).any()
    assert all(map(math.isfinite, output["advantages"].flatten().tolist()))


def test_which_answers_are_replaced_by_hand():
    """Groups of two: 0, 1 has a success; −1, 0 and 0.5, 0.25 have none, their worst are rows 2 and 5."""
    failed, places = to_replace(torch.tensor([0.0, 1.0, -1.0, 0.0, 0.5, 0.25]), group=2, least=1.0)
    assert failed.tolist() == [False, True, True] and places.tolist() == [0, 2, 5]


def test_a_reference_has_no_log_probs_of_a_sampler(tmp_path):
    """With vLLM: NaN, where TRL corrects nothing, for each of its tokens. The lists of TRL stay as they are."""
    gold = guided(tmp_path, data=conversations(gold=["five"] * 3), gold_column="gold").gold
    assert gold is not None
    own = Generated([[1], [1]], [[7, 8], [9]], None, ["a", "b"], [[-0.1, -0.2], [-0.3]], {}, None, [])
    new = gold._replaced(own, [{"gold": "x"}, {"gold": "five"}], {1: [5, 6, 7]})
    assert new.completion_ids == [[7, 8], [5, 6, 7]] and new.completions == ["a", "five"]
    assert new.logprobs is not None and new.logprobs[0] == [-0.1, -0.2] and len(new.logprobs[1]) == 3
    assert all(map(math.isnan, new.logprobs[1])) and own.completion_ids[1] == [9]


# --- what stays TRL's -----------------------------------------------------------------------------------------------


def test_adapters_and_evaluation(tmp_path):
    """PEFT trains adapters alone; TRL's own evaluation logs the credit of its answers, too."""
    from peft import LoraConfig

    model, tokenizer = tiny_text_model()
    args = GuidanceGRPOConfig(**settings(tmp_path, max_steps=1, num_generations_eval=2, per_device_eval_batch_size=6))
    data, lora = conversations(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = GuidanceGRPOTrainer(
        model, even_ids, args, data, eval_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert 0.4 < trainer.evaluate()["eval_credit/top_mass"] <= 1


def test_texts_without_a_chat_template(tmp_path):
    """TRL's standard format: the prompt is a text, and so is its negative prompt. The empty one is the end token alone."""
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["two plus three is", "nine minus one is", "six by two is"]})
    trainer = guided(tmp_path, data=data)
    rows, output = rollout(trainer)
    assert (output["advantages"].std(1) > 0).any()
    ids, mask = trainer._negative_ids(rows, torch.device("cpu"))
    said = trainer._tokenizer.batch_decode([own[keep.bool()] for own, keep in zip(ids, mask, strict=True)])
    assert said == [f"{row['prompt']} Give a wrong answer on purpose." for row in rows]
    trainer.args.negative_template = ""
    assert trainer._negative_ids(rows, torch.device("cpu"))[0].tolist() == [[trainer._tokenizer.eos_token_id]] * 12
