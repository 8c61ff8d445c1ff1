"""The training loop: sample, decode, score, share out credit, update. It knows algorithms only as rows of functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor

from gcpo_t2i import checkpoint, sharding
from gcpo_t2i.algo.credit import top_mass
from gcpo_t2i.algo.rows import needs
from gcpo_t2i.config import TrainConfig, resolve_algorithm
from gcpo_t2i.data import PromptSampler, load_prompts, notes_on
from gcpo_t2i.edits import Edits
from gcpo_t2i.errors import Stopped, UserError, everywhere
from gcpo_t2i.evaluate import Evaluation, eval_prompts, evaluate
from gcpo_t2i.files import cannot_write
from gcpo_t2i.lifeline import Lifeline
from gcpo_t2i.metrics import sample_metrics, timing
from gcpo_t2i.models.trained import missing
from gcpo_t2i.monitor import Watch, watched_rewards
from gcpo_t2i.plan.fit import settle_micro_batch
from gcpo_t2i.processes import Processes
from gcpo_t2i.report import Report
from gcpo_t2i.resume import settings_as_json
from gcpo_t2i.rollout import (
    GROUP_TENSORS,
    MAX_ROUNDS,
    NULL_BRANCH,
    REPLAYED,
    ROLLOUT_STATS,
    ROLLOUT_TENSORS,
    Batch,
    Sampling,
    collect,
    credit_tensors,
    kept_stats,
    replay,
    sample_batch,
)
from gcpo_t2i.run import Run, go_on, load_to_train, make_accelerator, open_run, starting_model
from gcpo_t2i.scoring import RewardFailed, RewardSet, check_applicable, scored_name
from gcpo_t2i.seeds import generators
from gcpo_t2i.stopping import Stopping
from gcpo_t2i.update import Metrics, Updater, learning_rate
from gcpo_t2i.yaml_files import save_config

CREDIT = 1  # sets a credit's random numbers apart from those of images
MAX_BAD_STEPS = 5  # in a row without a finite loss


def train(config: TrainConfig) -> Path:
    """Runs the whole training that `config` describes and returns the run folder.

    UserError for what the user can mend; Stopped, after a checkpoint, for Ctrl-C and SIGTERM.
    """
    trainer = Trainer(config)
    processes = trainer.processes
    with open_run(config, processes) as run:
        trainer.resume(run)
        if processes.index == 0:
            save_config(config, run.folder / "config.yaml")
        with (
            Lifeline(processes, go_on(run, processes)),
            Stopping(processes) as stopping,
            Report(config, run, trainer.accelerator, trainer.state.step) as report,
        ):
            for note in (*run.notes, *trainer.notes):
                report.warn(note)
            with kept_on_failure(trainer, run):
                run_steps(trainer, run, report, stopping)
            trainer.merge(run)
            report.finish(trainer.policy)
    return run.folder


@contextmanager
def kept_on_failure(trainer: Trainer, run: Run) -> Iterator[None]:
    """Where what ends a run leaves its state whole, a checkpoint of it is written; the error says how to go on."""
    cure = go_on(run, trainer.processes)
    try:
        yield
    except Stopped as stopped:
        trainer.save(run)
        raise Stopped(stopped.signal, f"stopped after step {trainer.state.step}; {cure}") from stopped
    except RewardFailed as failed:  # a server that died, for instance; in all processes
        if trainer.state.step == 0:
            raise
        trainer.save(run)
        raise everywhere(UserError(f"{failed}; stopped after step {trainer.state.step}; {cure}")) from failed
    except OSError as error:
        if not cannot_write(error):
            raise
        raise UserError(f"{run.folder}: cannot be written ({error.strerror}); mend that; {cure}") from error


def run_steps(trainer: Trainer, run: Run, report: Report, stopping: Stopping) -> None:
    """From where the state is to the last step. Whatever is due at a step and not there yet is made up for first."""
    config, state = trainer.config, trainer.state
    while True:
        stopping.check()
        if is_due(config.eval_every, state.step, config.steps) and state.step not in report.evaluated:
            report.evaluation(state.step, trainer.evaluate(report, stopping))
        if state.step == config.steps:
            return
        metrics, batch, maps = trainer.step()
        report.step(state.step, metrics, batch, maps)
        while trainer.watch.failures:
            report.warn(trainer.watch.failures.pop(0))
        if is_due(config.save_every, state.step, config.steps):
            trainer.save(run)


def is_due(every: int, step: int, steps: int) -> bool:
    """Before the first step, after the last, and every so many between (0: not between)."""
    return step in (0, steps) or (every > 0 and step % every == 0)


class Trainer:
    """What a run is made of, and one step of it. Everything that changes from step to step is in `state`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.algorithm, self.credit_settings = resolve_algorithm(config)
        prompts, self.held_out = load_prompts(config.train_prompts), load_prompts(config.eval.prompts)
        self.notes = notes_on(config.train_prompts, prompts)
        sharded = sharding.is_wanted(config.lora)
        self.accelerator = make_accelerator(config)
        device, self.processes = self.accelerator.device, Processes.of(self.accelerator)
        sharded = sharded and self.processes.count > 1
        self.rewards = replace(RewardSet.load(config.rewards, str(device)), success=config.success_reward)
        self.eval_rewards = RewardSet.load(config.eval.rewards, str(device), label=scored_name)
        self.rewards.check(prompts)
        self.eval_rewards.check(self.held_out)
        self.watch = Watch(watched_rewards(config, self.eval_rewards, str(device)), config.monitor.images)
        settle_micro_batch(config, device, self.processes, sharded)
        self.policy, self.adapters = load_to_train(config, device)
        self.required = needs(self.algorithm, self.credit_settings, config.loss.beta, config.loss.entropy_reward)
        if strange := self.required - ROLLOUT_TENSORS - ROLLOUT_STATS - GROUP_TENSORS - {"ref_logp"}:
            raise UserError(f"credit '{self.algorithm.credit.name}' needs {sorted(strange)}, which no rollout provides")
        compared = "ref_logp" in self.required or config.monitor.kl
        reference = starting_model(self.policy, self.adapters, sharded) if compared else None
        self.update = Updater(self.policy, reference, config, self.algorithm, self.accelerator, sharded)
        self.notes += missing(self.policy, None if self.adapters else config.optim.modules)
        self.edits = Edits(config, self.algorithm, self.policy, self.update, self.rewards, self.processes, prompts)
        self.notes += self.edits.notes
        self.prompts = PromptSampler(prompts, config.seed, config.train_mix)
        set_seed(config.seed * 1000 + self.processes.index)  # for rewards that draw from the global random numbers
        self.state = checkpoint.TrainState(self.policy, self.update.optimizer)

    def resume(self, run: Run) -> None:
        """Puts the state to where the run was. UserError for a checkpoint that cannot be used."""
        if run.checkpoint:
            load = partial(checkpoint.load, run.checkpoint, self.state, self.processes)
            self.notes += self.processes.together(load)
            self.update.take_over()

    def step(self) -> tuple[Metrics, Batch, Tensor]:
        """Sample, score, share out credit, update: advances the state by one step; what it measured and trained on, and
        the advantage maps (B, H, W), credit × advantage of every code."""
        config, state, step, started = self.config, self.state, self.state.step, time.perf_counter()
        before = state.random(), state.prompts_drawn
        try:
            sampled, drawn = collect(self._sample, self.algorithm.keep, MAX_ROUNDS, self.processes)
            batch, edited = self.edits(sampled)
        except RewardFailed:  # back to where the step began, so that it can be made again
            state.set_random(before[0])
            state.prompts_drawn = before[1]
            raise
        advantage, first = among_all(self.algorithm.advantage, batch, self.processes)  # (P, G)
        if self.algorithm.select is not None:
            tensors = credit_tensors(self.policy, batch, advantage, self.required)
            batch = replace(batch, selected=self.algorithm.select.fn(tensors, batch.mask))
        credit, kl_factor = self._credit(batch, advantage, first)  # (B, T)
        seen = sample_metrics(sampled, drawn, top_mass(credit, batch.mask), self.processes)
        if step == 0:
            check_applicable(self.rewards.weights, seen, batch.prompts)
        watched = self.watch(sampled) if self.accelerator.is_main_process else {}
        advantages = advantage.flatten().to(self.accelerator.device)  # (B,)
        updating = time.perf_counter()
        rate = learning_rate(config.optim, step, config.steps)
        updated, old_logp, skipped = {}, None, 0.0
        for epoch in range(config.updates_per_rollout):
            if epoch > 0 and config.credit.source == "replay":
                credit, kl_factor = self._credit(batch, advantage, first)
            updated, old_logp = self.update(batch, advantages, credit, rate, old_logp, kl_factor)
            skipped += updated["skipped"]
        self._count_bad_steps(skipped > 0)
        state.step += 1
        now = time.perf_counter()
        metrics = {
            **updated,
            "skipped": skipped,
            **seen,
            **edited,
            "learning_rate": rate,
            **watched,
            **timing(
                batch, sum(len(part.images) for part in drawn) * self.processes.count, now - started, now - updating
            ),
        }
        return metrics, batch, (credit * advantages[:, None]).unflatten(1, self.policy.grid)

    def evaluate(self, report: Report, stopping: Stopping) -> Evaluation:
        """Scores on held-out prompts. Stopped if the user does not want to wait for them."""
        config = self.config
        chosen = eval_prompts(self.held_out, config.eval)
        one = Sampling(1, config.guidance, config.temperature, config.top_k, config.top_p)
        with report.task("evaluate", len(chosen)) as show, self.accelerator.autocast():

            def on_progress(done: int) -> None:
                show(done)
                stopping.check()

            return evaluate(
                self.policy,
                chosen,
                self.eval_rewards,
                one,
                config.eval.seed,
                config.eval.batch_size,
                on_progress,
                self.processes,
            )

    def save(self, run: Run) -> None:
        """Writes a checkpoint of this step, unless it is there."""
        randoms, first = self.processes.gather(self.state.random()), self.processes.index == 0
        optimizer = sharding.whole_state(self.state.optimizer, keep=first)

        def write() -> None:
            if first and not (run.folder / f"checkpoint-{self.state.step}").exists():
                settings, keep_last = settings_as_json(self.config), self.config.keep_last
                checkpoint.save(run.folder, self.state, settings, randoms, keep_last, optimizer)

        self.processes.together(write)

    def merge(self, run: Run) -> None:
        """Saves the adapters, if there are any, and adds them to the weights of the policy."""
        if self.adapters and self.accelerator.is_main_process:
            self.adapters.save(run.folder / "adapter")
        if self.adapters:
            self.adapters.merge()

    def _sample(self) -> Batch:
        """Images of this process's share of the next prompts."""
        config = self.config
        share = config.prompts_per_step // self.processes.count
        start = self.state.prompts_drawn + self.processes.index * share
        self.state.prompts_drawn += config.prompts_per_step
        places = [(place, image) for place in range(start, start + share) for image in range(config.group_size)]
        sample = partial(
            sample_batch,
            self.policy,
            self.prompts.batch(start, share),
            self.rewards,
            Sampling.of(config),
            generators(config.seed, places),
            stats=kept_stats(config, self.required),
            need_null=bool(self.required & NULL_BRANCH),
            batch_size=config.rollout_batch_size,
        )
        with self.accelerator.autocast():
            return self.processes.together(sample, RewardFailed)

    def _credit(self, batch: Batch, advantage: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Credit (B, T), and the factor on the KL that goes with it, if there is one. From the log-probs of the rollout, or
        from those of the policy as it is now. `first`: the number of this process's first group among those of all."""
        rule, mask = self.algorithm.credit, batch.mask
        if self.config.credit.source == "replay" and rule.needs(self.credit_settings) & REPLAYED:
            with self.accelerator.autocast():
                batch = replay(self.policy, batch, self.config.micro_batch, self.config.temperature)
        draws = generators(
            self.config.seed, [(self.state.step, first * batch.group + i, CREDIT) for i in range(len(mask))]
        )
        tensors = credit_tensors(self.policy, batch, advantage, self.required)
        credit = rule.fn(tensors, mask, self.credit_settings, draws)
        return credit, rule.kl_factor(tensors, credit) if self.config.loss.kl_reweight else None

    def _count_bad_steps(self, bad: bool) -> None:
        self.state.bad_steps = self.state.bad_steps + 1 if bad else 0
        if self.state.bad_steps >= MAX_BAD_STEPS:
            raise everywhere(
                UserError(
                    f"the loss was not finite in {MAX_BAD_STEPS} steps in a row (last: step {self.state.step + 1}); lower "
                    f"--optim.learning_rate (now {self.config.optim.learning_rate:g}), and look at "
                    f"{Path(self.config.output_dir or '') / 'metrics.jsonl'}"
                )
            )


def among_all(advantage: Callable[[Tensor], Tensor], batch: Batch, processes: Processes) -> tuple[Tensor, int]:
    """The advantages (P, G) of this process's groups among those of all, and the number of its first group there."""
    own = batch.rewards[:0] if batch.idle else batch.rewards
    groups = processes.gather(own)  # where some were left out, not equally many
    first = sum(map(len, groups[: processes.index]))
    shared = advantage(torch.cat(groups))[first : first + len(own)]
    return torch.zeros_like(batch.rewards) if batch.idle else shared, first
