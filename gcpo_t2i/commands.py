"""The commands of the command line, each a row: a config dataclass, the function that gets it, and words for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gcpo_t2i.config import (
    BenchConfig,
    CompareConfig,
    ConvertLlamaGenConfig,
    CotHeatmapConfig,
    CotTrainConfig,
    CreditEvalConfig,
    DemoConfig,
    EnvConfig,
    EvaluationConfig,
    HeatmapConfig,
    PlanConfig,
    PretrainConfig,
    ProbeConfig,
    PromptsGenevalConfig,
    RewardsCheckConfig,
    RewardsServeConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Command:
    """`run` is called with a `config` and returns where its results are, an exit code, or None. A file for --config may hold
    `also` the settings of that class, which are left out."""

    config: type[Any]
    run: str
    summary: str
    details: str
    also: type[Any] | None = None


COMMANDS = {
    "train": Command(
        TrainConfig,
        "gcpo_t2i.train:train",
        "fine-tune a text-to-image model by reinforcement learning",
        """\
Fine-tune an autoregressive text-to-image model by reinforcement learning. Without any option: the model,
prompts and rewards that ship with the package, on the CPU if there is no GPU, results in runs/.

  gcpo-t2i train
  gcpo-t2i train --algorithm grpo --steps 100 --output_dir runs/grpo
  gcpo-t2i train --config configs/shapesworld_grpo.yaml --optim.learning_rate 5e-5
  gcpo-t2i train --rewards '[{"name": "clip", "weight": 0.5}, {"name": "my_reward.py:score"}]'
  gcpo-t2i train --output_dir runs/grpo --resume""",
    ),
    "eval": Command(
        EvaluationConfig,
        "gcpo_t2i.evals.command:evaluate",
        "score a model, or a folder of images, on GenEval's kind of prompts; compare two",
        """\
Score a model on prompts in GenEval's format. Writes GenEval's own layout of images, results.jsonl,
scores.json, and the recipe that the numbers were made with; prints the scores per tag and over all tags,
with 95 % intervals. Or score a folder of images that somebody else made; or compare two evaluations.

  gcpo-t2i eval
  gcpo-t2i eval --model runs/grpo/policy --prompts evaluation_metadata.jsonl --output_dir evals/grpo
  gcpo-t2i eval --model runs/grpo/policy --against evals/base
  gcpo-t2i eval --images folder/of/images
  gcpo-t2i eval --results evals/grpo --against evals/base""",
    ),
    "plan": Command(
        PlanConfig,
        "gcpo_t2i.plan:plan",
        "what a training run will take: batches, passes, memory, time",
        """\
What a training run will take, before it is started: batch arithmetic, passes through the model, memory by
part, and the time per step and per run. Options are those of train; nothing is written.

  gcpo-t2i plan
  gcpo-t2i plan --group_size 16 --micro_batch_size 8
  gcpo-t2i plan --config configs/shapesworld_grpo.yaml --processes 4
  gcpo-t2i plan --measure false --device cuda               # without a GPU at hand: no times
  gcpo-t2i plan --gpu h100 --processes 8                    # does memory do, and how long does a step take at least?""",
    ),
    "probe": Command(
        ProbeConfig,
        "gcpo_t2i.probe:probe",
        "does a set-up learn at all? A minute's answer, with the likely cause if not",
        """\
Does this set-up learn at all? A few steps with the model, algorithm, batch, precision and learning rate of a
run, on four fixed prompts and with a reward that every model can raise: the redness of the image.
Says learns, does not learn or unclear, shows the curve, and names the likely cause if it does not.
Exit code 0 if it learns, else 1.

It takes every option of train, so that the command or the settings file of a run can be probed as it is.
Rewards, evaluation, checkpoints, warm-up and schedule of the run are not used.

  gcpo-t2i probe
  gcpo-t2i probe --model my/policy --algorithm grpo --optim.learning_rate 1e-5 --dtype bfloat16
  gcpo-t2i probe --config my_run.yaml --steps 20 --output_dir runs/probe""",
    ),
    "compare": Command(
        CompareConfig,
        "gcpo_t2i.compare:compare",
        "train several algorithms with several seeds; a table and a figure with intervals",
        """\
Train every algorithm with every seed, with the same settings otherwise and in parallel processes, and compare
them on the same held-out images: one table and one figure, with intervals over seeds and prompts, and each
algorithm's difference to grpo and to random_credit. The same command again goes on where it was.

Settings that all runs share are given as --train.KEY, or as --train FILE with the settings of a run; its
algorithm, seed and output_dir are replaced. Language models are compared with --of texts, and with --cot in the
place of --train.

  gcpo-t2i compare
  gcpo-t2i compare --algorithms grpo guidance_gcpo random_credit --seeds 0 1 2 3 4 --output_dir runs/credit
  gcpo-t2i compare --train.steps 50 --train.updates_per_rollout 2 --jobs 2
  gcpo-t2i compare --train my_run.yaml --train.optim.learning_rate 2e-4
  gcpo-t2i compare --of texts --algorithms grpo guidance_gcpo random_credit --cot.steps 60 --output_dir runs/texts""",
    ),
    "credit-eval": Command(
        CreditEvalConfig,
        "gcpo_t2i.credit_eval:credit_eval",
        "are the credit maps right? Held against objects, phrases, and true token advantages",
        """\
Are the credit maps right? Every way to find the tokens that deserve credit is held against what is known:
where the objects are (true masks), which object a phrase names, and which tokens decided the reward (the true
token advantage, by Monte Carlo: an hour or two on two CPU cores). The same command again goes on where it was,
and draws tables and figure from what is stored.

  gcpo-t2i credit-eval
  gcpo-t2i credit-eval --truths objects phrases                                # a minute or two
  gcpo-t2i credit-eval --model runs/grpo/policy --output_dir runs/credit-grpo
  gcpo-t2i credit-eval --images_per_tag 4 --continuations 32 --output_dir runs/credit-quick""",
    ),
    "pretrain": Command(
        PretrainConfig,
        "gcpo_t2i.shapes.pretrain:pretrain",
        "make the shipped checkpoints again from nothing",
        """\
Make the checkpoints that ship with the package again, from nothing: image tokenizer (vq), generator,
tiny CLIP, aesthetic head, and the language model of cot train (reasoner).

  gcpo-t2i pretrain --output_dir checkpoints
  gcpo-t2i pretrain --output_dir checkpoints --resume""",
    ),
    "sample": Command(
        SampleConfig,
        "gcpo_t2i.sample:sample",
        "make images from prompts",
        """\
Make images from a prompt, or from a file of prompts: one PNG each, and a grid of them all.

  gcpo-t2i sample --prompt "a photo of a red circle"
  gcpo-t2i sample --model runs/grpo/policy --prompts shapesworld:heldout --num_images 2 --out samples/grpo""",
    ),
    "heatmap": Command(
        HeatmapConfig,
        "gcpo_t2i.maps.command:heatmap",
        "draw which parts of an image got the credit, and what an update would reinforce",
        """\
Sample a group of images of one prompt, score them, and draw over each the credit of every part, and credit ×
advantage: what an update would reinforce and what it would suppress. Or explain a picture; or show where a phrase
of the prompt acts; or compare two models. Writes heatmap.png, the single maps, and all numbers.

  gcpo-t2i heatmap
  gcpo-t2i heatmap --prompt "a red circle and a blue square" --phrases "red circle" "blue square"
  gcpo-t2i heatmap --prompt "a red circle" --negative "a circle" --contrast exact_kl
  gcpo-t2i heatmap --prompt "a red circle" --image picture.png
  gcpo-t2i heatmap --model runs/grpo/policy --compare shapesworld --out heatmaps/trained""",
    ),
    "convert llamagen": Command(
        ConvertLlamaGenConfig,
        "gcpo_t2i.convert.llamagen:convert",
        "make a policy of published LlamaGen weights",
        """\
Make a policy folder of published LlamaGen weights (arXiv 2406.06525), for --model of every other command. Says
which tensors do not fit, if some do not. Where to get the files: docs/llamagen.md.

  gcpo-t2i convert llamagen --gpt t2i_XL_stage1_256.pt --vq vq_ds16_t2i.pt --out models/llamagen-256
  gcpo-t2i convert llamagen --gpt my.pt --image_size 512 --vq vq_ds16_t2i.pt --text_encoder flan-t5-xl --out mine""",
    ),
    "cot train": Command(
        CotTrainConfig,
        "gcpo_t2i.cot.train:train",
        "fine-tune a language model that reasons in steps, on TRL",
        """\
Fine-tune a language model on questions whose answers can be checked, with TRL and the credit of this package:
more for the tokens that the question decided. Without any option: a small model and arithmetic in words that
ship with the package, in minutes on a CPU. Needs pip install "gcpo-t2i[cot]".

  gcpo-t2i cot train
  gcpo-t2i cot train --algorithm gold_gcpo --steps 100 --output_dir runs/gold
  gcpo-t2i cot train --model Qwen/Qwen2.5-1.5B-Instruct --train_data questions.jsonl --eval.data heldout.jsonl
  gcpo-t2i cot train --config configs/cot_qwen_1.5b_gsm8k.yaml --trl '{"use_vllm": true}'""",
    ),
    "cot heatmap": Command(
        CotHeatmapConfig,
        "gcpo_t2i.cot.heatmap:heatmap",
        "show which tokens of an answer got the credit",
        """\
Answer a question several times, and colour every token by its credit: how much the question, and not a request
for a wrong answer, decided it. With the right answer also credit x advantage: what an update would reinforce
and what it would suppress. In the terminal, and as an HTML file.

  gcpo-t2i cot heatmap
  gcpo-t2i cot heatmap --prompt "Ann has two pens. She doubles them. How many pens does Ann have?" --answer 4
  gcpo-t2i cot heatmap --model runs/cot_guidance_gcpo-1/policy --out trained.html
  gcpo-t2i cot heatmap --text "nine plus five is fourteen. answer: 14" --answer 14""",
    ),
    "demo": Command(
        DemoConfig,
        "gcpo_t2i.demo.command:demo",
        "a page in the browser that shows the credit",
        """\
A page in the browser: images and their credit maps, maps of your own pictures, training runs, and the model before
and after training. It listens on this machine only, unless told otherwise.

  gcpo-t2i demo
  gcpo-t2i demo --runs_dir runs --port 8000
  gcpo-t2i demo --host 0.0.0.0 --auth users.txt             # lines of USER:PASSWORD""",
    ),
    "prompts geneval": Command(
        PromptsGenevalConfig,
        "gcpo_t2i.geneval_prompts:make_prompts",
        "make training prompts from GenEval's templates, without those of an evaluation",
        """\
Make training prompts from the templates that GenEval's evaluation prompts are made from: COCO's classes, ten
colours, numbers, places. Each comes with the metadata by which the reward geneval judges its images.

  gcpo-t2i prompts geneval --exclude evaluation_metadata.jsonl --out geneval_train.jsonl
  gcpo-t2i prompts geneval --n 5000 --mix '{"counting": 1, "position": 2}'""",
    ),
    "rewards check": Command(
        RewardsCheckConfig,
        "gcpo_t2i.rewards_check:check",
        "score known good, bad and blank images: what does each reward say?",
        """\
Score images that are known to be good, bad, blank and noise with each reward, and show what it says, how long it
takes, and whether it tells good from bad. The exit code is 1 if a reward fails: it raises, or returns NaN, a value
out of its range, or the wrong number of scores.

  gcpo-t2i rewards check
  gcpo-t2i rewards check --rewards '[{"name": "my_reward.py:score"}]'
  gcpo-t2i rewards check --config configs/shapesworld_grpo.yaml
  gcpo-t2i rewards check --images known.jsonl --rewards '[{"name": "clip"}]'""",
        also=TrainConfig,
    ),
    "rewards serve": Command(
        RewardsServeConfig,
        "gcpo_t2i.rewards_serve:serve",
        "serve rewards over HTTP, for trainers that share a detector or lack the memory",
        """\
Serve rewards over HTTP to any number of trainers, which name them as remote. Prints the settings for the
trainers. It listens at 127.0.0.1 unless told otherwise; there is no password, so open it in a trusted network only.

  gcpo-t2i rewards serve --rewards '[{"name": "clip"}, {"name": "geneval"}]'
  gcpo-t2i rewards serve --config my_run.yaml --host 0.0.0.0 --port 9000
  gcpo-t2i train --rewards '[{"name": "remote", "kwargs": {"url": "http://gpu7:9000", "reward": "clip"}}]'""",
        also=TrainConfig,
    ),
    "bench": Command(
        BenchConfig,
        "gcpo_t2i.bench.command:bench",
        "how fast rollouts and steps are here, against other ways and against the memory's speed",
        """\
How fast rollouts and training steps are on this machine: images/s and codes/s, seconds by phase, memory. Against
transformers' own generate and a plain loop, in turns and with the same weights; and against the time that
reading weights and cache would take at the speed of a copy.

  gcpo-t2i bench
  gcpo-t2i bench --shape small_janus --prompts 4 --group_size 8
  gcpo-t2i bench --shape janus_pro_7b --what step --lora_rank 32 --group_size 16 --prompts 1
  gcpo-t2i bench --what log_probs
  gcpo-t2i bench --what scaling --shape small_janus --out bench/scaling""",
    ),
    "env": Command(
        EnvConfig,
        "gcpo_t2i.env:env",
        "versions and hardware, for a bug report",
        """\
Versions and hardware as Markdown, to be pasted into a bug report. It names no user, host or folder.

  gcpo-t2i env
  gcpo-t2i env --json""",
    ),
}
