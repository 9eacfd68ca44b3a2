"""What an adapter method costs and gives: trained share, time, memory and accuracy of each.

    python -m tests.benchmarks.adapter_methods --out adapter_methods.json
    python -m tests.benchmarks.adapter_methods --models decoder --methods lora bitfit --epochs 1

The task is to tell praise from blame in sentences of film reviews. Two small models, an encoder
shaped like RoBERTa and a decoder shaped like GPT-2, first learn the language from the unlabelled
training sentences and from whole reviews; then each method trains the same one on the labels, in a
process of its own on one thread. Times are the processor's, of training alone. Learning rates were
set once per method, from the literature's ratios between them; nothing was tuned. Linux only.
"""

import argparse
import gzip
import json
import resource
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

from tests.benchmarks import common

# The keys of the recipe's adapter section, and the learning rate.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({}, 5e-4),
    "head_only": ({}, 1e-2),
    "top_layers": ({"top_layers": 1}, 1e-3),
    "bitfit": ({}, 5e-3),
    "bottleneck-houlsby": ({"method": "bottleneck", "bottleneck_size": 8}, 2e-3),
    "bottleneck-pfeiffer": (
        {"method": "bottleneck", "bottleneck_size": 8, "placement": "pfeiffer"},
        2e-3,
    ),
    "lora": ({"r": 4, "alpha": 8.0}, 2e-3),
    "lora-dora": ({"method": "lora", "r": 4, "alpha": 8.0, "dora": True}, 2e-3),
    "prefix": ({"prefix_tokens": 8}, 1e-2),
}
VOCABULARY, LONGEST, BATCH = 4096, 48, 32
PAD, START, END, MASK = range(4)
SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
MASKED = 0.15  # of the tokens (Devlin et al. 2019), all of them replaced by <mask>


def sentences(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """Return texts and labels of a split."""
    path = folder / "classification" / "sentence_polarity" / f"{split}.jsonl"
    if not path.is_file():
        sys.exit(f"{path}: no such file; --data names the folder that holds it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def reviews(folder: Path) -> list[str]:
    """Return the sentences of whole reviews, for the language only."""
    path = folder / "classification" / "movie_reviews" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line for row in file for line in json.loads(row)["text"].split("\n")]
    return [line for line in lines if len(line.split()) > 4]


def make_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def make_config(kind: str, width: int, layers: int) -> Any:
    """Return the shape of the encoder or the decoder; no dropout, so that runs compare."""
    from transformers import GPT2Config, RobertaConfig

    if kind == "encoder":
        return RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=2 * LONGEST,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
        )
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_positions=2 * LONGEST,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )


def batches(rows: list[list[int]], steps: int, seed: int) -> Any:
    """Yield ``steps`` batches of row numbers; rows of an epoch in random order, none twice."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(rows), generator=generator).tolist()
        yield [order.pop() for _ in range(BATCH)]


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """Return ids and attention mask ``[B, T]``, padded on the right."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def train(model: Any, steps: int, lr: float, loss_of: Any, note: str) -> float:
    """Train by AdamW, rate up for a tenth of the steps, down to 0; return processor seconds."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, max(0.0, (steps - n) / (steps - warmup)))
    )
    model.train()
    started, total = process_time(), 0.0
    for step in range(1, steps + 1):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        total += loss.item()
        if step % 200 == 0 or step == steps:
            common.say(f"{note}  step {step}  loss {total / ((step - 1) % 200 + 1):.3f}")
            total = 0.0
    return process_time() - started


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Make a base by masked (encoder) or causal (decoder) language modelling; save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    texts, _ = sentences(options.data, "train")
    texts += reviews(options.data)
    tokenizer = make_tokenizer(texts)
    tokenizer.save(str(options.base / "tokenizer.json"))
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    torch.manual_seed(0)
    config = make_config(options.kind, options.width, options.layers)
    maker = AutoModelForMaskedLM if options.kind == "encoder" else AutoModelForCausalLM
    model = maker.from_config(config)
    chosen = iter(batches(rows, options.pretrain_steps, seed=0))
    generator = torch.Generator().manual_seed(0)

    def loss_of(_: int) -> Any:
        ids, mask = padded([rows[i] for i in next(chosen)])
        if options.kind == "decoder":
            labels = ids.masked_fill(mask == 0, -100)
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss
        hidden = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids > MASK)
        labels = ids.masked_fill(~hidden, -100)
        return model(
            input_ids=ids.masked_fill(hidden, MASK), attention_mask=mask, labels=labels
        ).loss

    seconds = train(model, options.pretrain_steps, 2e-3, loss_of, f"{options.kind} pretraining")
    model.save_pretrained(options.base)
    return {"seconds": seconds, "parameters": model.base_model.num_parameters()}


def classify(options: argparse.Namespace) -> dict[str, Any]:
    """Train one method on the labels and measure it on the test sentences."""
    import torch
    from peft import get_peft_model
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    from align.adapter_methods import adapter_config, check_trained, trained_share
    from align.recipe_adapter import Adapter

    keys, lr = METHODS[options.method]
    adapter = Adapter.model_validate({"method": options.method} | keys)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(options.base / "tokenizer.json"))
    model = AutoModelForSequenceClassification.from_pretrained(options.base, num_labels=2)
    base_parameters = model.num_parameters()
    head = "classifier" if options.kind == "encoder" else "score"
    config = adapter_config(adapter, "SEQ_CLS", model, head)
    if config is not None:
        model = get_peft_model(model, config)
    check_trained(model, adapter.method)
    share = trained_share(model, base_parameters)

    def load(split: str) -> tuple[list[list[int]], Any]:
        texts, labels = sentences(options.data, split)
        return [e.ids for e in tokenizer.encode_batch(texts)], torch.tensor(labels)

    rows, labels = load("train")
    steps = options.epochs * len(rows) // BATCH
    chosen = iter(batches(rows, steps, seed=options.seed))

    def loss_of(_: int) -> Any:
        picked = next(chosen)
        ids, mask = padded([rows[i] for i in picked])
        return model(input_ids=ids, attention_mask=mask, labels=labels[picked]).loss

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = train(model, steps, lr, loss_of, f"{options.kind} {options.method}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, labels = load("test")
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            ids, mask = padded(rows[start : start + BATCH])
            logits = model(input_ids=ids, attention_mask=mask).logits
            right += int((logits.argmax(-1) == labels[start : start + BATCH]).sum())
    return {
        "model": options.kind,
        "method": options.method,
        "lr": lr,
        "trained parameters": int(share["trained/parameters"]),
        "trained %": 100 * share["trained/share"],
        "seconds": seconds,
        "peak MB": peak / 1024,
        "of it training MB": (peak - before) / 1024,
        "accuracy": right / len(rows),
    }


def child(arguments: list[str | Path], folder: Path, name: str) -> dict[str, Any]:
    """Run this module once more in a process of its own; return what it writes."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", __spec__.name, *arguments, "--out", out]
    common.run(command, folder / f"{name}.log")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    common.say(f"{name}: {result}")
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain each model, then train every method on it."""
    shape: list[str | Path] = ["--data", options.data, "--width", str(options.width)]
    shape += ["--layers", str(options.layers)]
    rows, bases = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in options.models:
            folder = Path(temporary) / kind
            (folder / "base").mkdir(parents=True)
            common_part = [*shape, "--kind", kind, "--base", folder / "base"]
            steps = ["--pretrain-steps", str(options.pretrain_steps)]
            bases[kind] = child([*common_part, *steps], folder, f"{kind}-pretraining")
            for method in options.methods:
                for seed in range(options.seeds):
                    more = ["--method", method, "--epochs", str(options.epochs)]
                    more += ["--seed", str(seed)]
                    name = f"{kind}-{method}-{seed}"
                    rows.append(child([*common_part, *more], folder, name))
    return {"bases": bases, "rows": rows}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=common.ROOT.parent / "shared" / "data",
        help="folder with classification/sentence_polarity (default: %(default)s)",
    )
    parser.add_argument("--models", nargs="+", choices=("encoder", "decoder"), default=None)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=96, help="hidden size (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers there, as JSON")
    # What the processes that this one starts are told.
    parser.add_argument("--kind", choices=("encoder", "decoder"), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=tuple(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()
    options.models = options.models or ["encoder", "decoder"]
    if options.kind is not None:
        result = classify(options) if options.method else pretrain(options)
    else:
        result = measure(options)
        print(common.table(result["rows"]))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
