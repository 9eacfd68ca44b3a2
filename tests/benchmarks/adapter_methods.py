"""What an adapter method costs and gives: trained share, time, memory and accuracy of each.

    python -m tests.benchmarks.adapter_methods --out adapter_methods.json
    python -m tests.benchmarks.adapter_methods --models decoder --methods lora bitfit --epochs 1

The task is to tell praise from blame in sentences of film reviews. Two small models, an encoder
shaped like RoBERTa and a decoder shaped like GPT-2, first learn from pieces of other, whole reviews
whether the review praises; then each method trains the same one on the sentences, in a process of
its own on one thread. (Masked language modelling on so little text stayed at the entropy of single
words, 6.7 nats a token; LoRA on what came of it, in one run, was at chance.) Times are the
processor's, of training alone. The methods' learning rates were set once, from the literature's
ratios between them. The first task and the bases' rate were chosen after looking at accuracies:
compare the methods with each other, and do not take a base's accuracy for a fair one. Linux only.
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
PAD, START, END = range(3)
SPECIAL = ("<pad>", "<s>", "</s>")
BASE_RATE = 5e-4  # at 2e-3 a RoBERTa of this size, with its norms after the sum, learns nothing


def sentences(folder: Path, split: str) -> tuple[list[str], list[int]]:
    """Return texts and labels of a split."""
    path = folder / "classification" / "sentence_polarity" / f"{split}.jsonl"
    if not path.is_file():
        sys.exit(f"{path}: no such file; --data names the folder that holds it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def reviews(folder: Path) -> tuple[list[str], list[int]]:
    """Return texts and labels of whole reviews; none of the sentences is from one of them."""
    path = folder / "classification" / "movie_reviews" / "train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["text"].replace("\n", " ") for row in rows], [row["label"] for row in rows]


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


def learn(
    model: Any, rows: list[list[int]], labels: Any, steps: int, lr: float, seed: int, note: str
) -> float:
    """Train a classifier on rows of ids and their labels ``[N]``; return processor seconds."""
    chosen = iter(batches(rows, steps, seed))

    def loss_of(_: int) -> Any:
        picked = next(chosen)
        ids, mask = padded([rows[i] for i in picked])
        return model(input_ids=ids, attention_mask=mask, labels=labels[picked]).loss

    return train(model, steps, lr, loss_of, note)


def accuracy(model: Any, rows: list[list[int]], labels: Any) -> float:
    """Return the share of rows that the classifier gets right."""
    import torch

    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            ids, mask = padded(rows[start : start + BATCH])
            logits = model(input_ids=ids, attention_mask=mask).logits
            right += int((logits.argmax(-1) == labels[start : start + BATCH]).sum())
    return right / len(rows)


def encoded(tokenizer: Any, folder: Path, split: str) -> tuple[list[list[int]], Any]:
    """Return the sentences of a split as ids, and their labels ``[N]``."""
    import torch

    texts, labels = sentences(folder, split)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)], torch.tensor(labels)


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Make a base that knows whole reviews, piece by piece; save it without its head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    texts, marks = reviews(options.data)
    tokenizer = make_tokenizer(sentences(options.data, "train")[0] + texts)
    tokenizer.save(str(options.base / "tokenizer.json"))
    rows, labels = [], []
    for encoding, mark in zip(tokenizer.encode_batch(texts), marks, strict=True):
        pieces = [encoding, *encoding.overflowing]  # of LONGEST tokens with <s> and </s>
        rows += [piece.ids for piece in pieces]
        labels += [mark] * len(pieces)
    torch.manual_seed(0)
    config = make_config(options.kind, options.width, options.layers)
    model = AutoModelForSequenceClassification.from_config(config)
    note = f"{options.kind} base"
    steps = options.base_epochs * len(rows) // BATCH
    seconds = learn(model, rows, torch.tensor(labels), steps, BASE_RATE, 0, note)
    untrained = accuracy(model, *encoded(tokenizer, options.data, "test"))
    model.base_model.save_pretrained(options.base)
    parameters = model.base_model.num_parameters()
    return {"seconds": seconds, "parameters": parameters, "accuracy": untrained}


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
    config = adapter_config(adapter, "SEQ_CLS", model, [head])
    if config is not None:
        model = get_peft_model(model, config)
    check_trained(model, adapter.method)
    share = trained_share(model, base_parameters)

    rows, labels = encoded(tokenizer, options.data, "train")
    steps = options.epochs * len(rows) // BATCH
    note = f"{options.kind} {options.method}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = learn(model, rows, labels, steps, lr, options.seed, note)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": options.kind,
        "method": options.method,
        "lr": lr,
        "trained parameters": int(share["trained/parameters"]),
        "trained %": 100 * share["trained/share"],
        "seconds": seconds,
        "peak MB": peak / 1024,
        "of it training MB": (peak - before) / 1024,
        "accuracy": accuracy(model, *encoded(tokenizer, options.data, "test")),
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
    """Make each base, then train every method on it."""
    shape: list[str | Path] = ["--data", options.data, "--width", str(options.width)]
    shape += ["--layers", str(options.layers)]
    rows, bases = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in options.models:
            folder = Path(temporary) / kind
            (folder / "base").mkdir(parents=True)
            common_part = [*shape, "--kind", kind, "--base", folder / "base"]
            epochs = ["--base-epochs", str(options.base_epochs)]
            bases[kind] = child([*common_part, *epochs], folder, f"{kind}-base")
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
    parser.add_argument("--base-epochs", type=int, default=2)
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
