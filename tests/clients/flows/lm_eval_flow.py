"""lm-eval's own `local-completions`: token-id prompts in batches with echo and log-probabilities, and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHOICES = """task: multilora_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GENERATION = """task: multilora_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
NUM_DOCS = 12


def main(folder: Path) -> None:
    data = folder / "docs.jsonl"
    docs = [
        {"question": f"Question {n}: hello", "choices": [" yes", " no", " perhaps"], "answer": n % 3}
        for n in range(NUM_DOCS)
    ]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("choice", CHOICES), ("generate", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    model = f"model={os.environ['CLIENT_MODEL']},base_url={os.environ['CLIENT_URL']}/completions,"
    model += f"tokenizer={os.environ['CLIENT_TOKENIZER']},num_concurrent=4,max_length=256"
    command = [
        str(Path(sys.executable).with_name("lm_eval")),
        "run",
        "--model",
        "local-completions",
        "--model_args",
        model,
    ]
    command += ["--tasks", "multilora_choice,multilora_generate", "--include_path", str(folder), "--batch_size", "4"]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "OPENAI_API_KEY": os.environ["CLIENT_KEY"], "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [results] = (folder / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert 0 <= scores["multilora_choice"]["acc,none"] <= 1
    samples = [
        json.loads(line) for path in (folder / "out").rglob("samples_multilora_choice*.jsonl") for line in path.open()
    ]
    assert len(samples) == NUM_DOCS
    likelihoods = [float(choice[0][0]) for sample in samples for choice in sample["resps"]]
    assert len(likelihoods) == 3 * NUM_DOCS
    assert all(-200 < each < 0 for each in likelihoods)
    accuracy = scores["multilora_choice"]["acc,none"]
    print(f"{NUM_DOCS} documents by log-likelihood in batches of 4 and by generation; acc {accuracy:.2f}")


with tempfile.TemporaryDirectory() as scratch:
    main(Path(scratch))
