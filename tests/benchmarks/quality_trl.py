"""TRL 1.12's PPOTrainer from the models that ``quality.py`` has exported; runs in its environment.

    OMP_NUM_THREADS=1 TRL_ENV/bin/python tests/benchmarks/quality_trl.py PARENTS --seed 0 --out FILE

Writes JSON lines. The first has the settings, the seed, and how far the scores that TRL reads off
the reward model lie from Align's on the same responses. Then comes one line per look at the policy,
``update``, ``minutes`` of training without the looks, ``responses``: token ids that answer the
held-out prompts. The trainer is used through its constructor, ``train()`` and a callback.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"

import datasets
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.utils import get_reward

LARGEST_SCORE_ERROR = 1e-4


def load_scorer(folder: Path) -> Any:
    """Load a sequence classifier whose head has a bias, which transformers' own has not."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1
    )
    tensors = load_file(folder / "model.safetensors")
    head = torch.nn.Linear(model.score.in_features, 1)
    head.load_state_dict({name: tensors[f"score.{name}"] for name in ("weight", "bias")})
    model.score = head
    return model.eval()


def lora(settings: dict[str, Any], task: str) -> LoraConfig:
    """Return a new adapter as the recipe has it."""
    return LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules=settings["targets"],
        task_type=task,
    )


def pad_left(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Return rows as one tensor, padded on the left."""
    width = max(map(len, rows))
    return torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])


@torch.no_grad()
def score_error(model: Any, rows: list[dict[str, Any]], pad_id: int) -> float:
    """Return the largest difference between TRL's scores and those in ``rows``."""
    prompts = pad_left([row["prompt"] for row in rows], pad_id)
    length = max(len(row["response"]) for row in rows)
    padded = [row["response"] + [pad_id] * (length - len(row["response"])) for row in rows]
    joined = torch.cat((prompts, torch.tensor(padded)), dim=1)
    _, scores, _ = get_reward(model, joined, pad_id, prompts.shape[1])
    return float((scores - torch.tensor([row["score"] for row in rows])).abs().max())


class Probe(TrainerCallback):
    """Answers the held-out prompts as the policy stands; the clock stops meanwhile."""

    def __init__(
        self, settings: dict[str, Any], prompts: list[list[int]], seed: int, out: Path
    ) -> None:
        self.settings, self.seed, self.out = settings, seed, out
        self.prompts = pad_left(prompts, settings["pad_id"])
        self.seconds = 0.0
        self.policy: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Look at the policy before the first update."""
        self.look(0)
        self.resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the policy when it is time."""
        step, settings = state.global_step, self.settings
        self.seconds += time.perf_counter() - self.resumed
        if step % settings["probe_every"] == 0 or step == settings["steps"]:
            self.look(step)
        self.resumed = time.perf_counter()

    @torch.no_grad()
    def look(self, update: int) -> None:
        """Append one line; the samples' seed is the same every time, training's is untouched."""
        settings = self.settings
        config = GenerationConfig(
            max_new_tokens=settings["max_new_tokens"],
            temperature=settings["temperature"],
            top_k=0,
            top_p=1.0,
            do_sample=True,
            eos_token_id=settings["end_id"],
            pad_token_id=settings["pad_id"],
        )
        training = self.policy.training
        self.policy.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            output = self.policy.generate(
                input_ids=self.prompts,
                attention_mask=(self.prompts != settings["pad_id"]).long(),
                generation_config=config,
            )
        self.policy.train(training)
        responses = []
        for ids in output[:, self.prompts.shape[1] :].tolist():
            end = ids.index(settings["end_id"]) + 1 if settings["end_id"] in ids else len(ids)
            responses.append(ids[:end])
        row = {"update": update, "minutes": self.seconds / 60, "responses": responses}
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def ppo_config(settings: dict[str, Any], seed: int, folder: str) -> PPOConfig:
    """Return TRL's settings of the recipe's PPO section."""
    return PPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=1,
        num_mini_batches=settings["batch_size"] // settings["minibatch_size"],
        num_ppo_epochs=settings["epochs"],
        total_episodes=settings["batch_size"] * settings["steps"],
        local_rollout_forward_batch_size=settings["batch_size"],
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        missing_eos_penalty=settings["missing_eos"],
        temperature=settings["temperature"],
        kl_coef=settings["kl_coef"],
        kl_estimator=settings["kl_estimator"],
        cliprange=settings["clip"],
        cliprange_value=settings["value_clip"],
        vf_coef=settings["value_coef"],
        gamma=settings["gamma"],
        lam=settings["lam"],
        whiten_rewards=False,
        learning_rate=settings["lr"],
        adam_epsilon=settings["adam_epsilon"],
        lr_scheduler_type="constant",
        weight_decay=settings["weight_decay"],
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Parse the command line, check the scores, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parents", type=Path, help="folder that quality.py has exported to")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    parents = options.parents
    settings = json.loads((parents / "settings.json").read_text(encoding="utf-8"))
    prompts = json.loads((parents / "prompts.json").read_text(encoding="utf-8"))
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(parents / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(parents / "policy", dtype=torch.float32)
    reward = load_scorer(parents / "reward")
    error = score_error(reward, prompts["scored"], settings["pad_id"])
    if error > LARGEST_SCORE_ERROR:
        raise SystemExit(f"{parents}: scores differ from Align's by up to {error:.1e}")
    value = get_peft_model(load_scorer(parents / "reward"), lora(settings, "SEQ_CLS"))
    for name, parameter in value.named_parameters():
        if name.endswith("score.modules_to_save.default.bias"):
            parameter.requires_grad_(False)  # Align's critic keeps its offset, too
    head = {"settings": settings, "seed": options.seed, "score_error": error}
    options.out.write_text(json.dumps(head) + "\n", encoding="utf-8")

    probe = Probe(settings, prompts["heldout"], options.seed, options.out)
    data = datasets.Dataset.from_dict({"input_ids": prompts["train"]})
    with tempfile.TemporaryDirectory() as temporary:
        trainer = PPOTrainer(
            args=ppo_config(settings, options.seed, temporary),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,  # the policy without its adapter: the merged SFT model
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data.select(range(1)),
            peft_config=lora(settings, "CAUSAL_LM"),
            callbacks=[probe],
        )
        probe.policy = trainer.model.policy
        trainer.train()


if __name__ == "__main__":
    main()
