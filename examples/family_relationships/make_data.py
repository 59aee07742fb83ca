"""Makes the quickstart's data: questions on family relationships, from reasoning-gym (Apache-2.0).

Run it in this folder to get the same files again: ``pip install reasoning-gym && python make_data.py``.
"""

import json
from pathlib import Path

from reasoning_gym import create_dataset

# Training and test rows come from different seeds and share no question.
SIZES = {"train": (3000, 1), "test": (128, 2)}
SYSTEM = "Answer in one word."  # the model's own system message is three times as long, in every row


def main() -> None:
    """Writes ``train.jsonl`` and ``test.jsonl``, one object a line with ``system``, ``instruction`` and ``output``."""
    seen: set[str] = set()
    for name in ("test", "train"):
        size, seed = SIZES[name]
        rows = [row for row in create_dataset("family_relationships", size=size, seed=seed) if row["question"] not in seen]
        seen.update(row["question"] for row in rows)
        lines = [json.dumps({"system": SYSTEM, "instruction": row["question"], "output": row["answer"]}) for row in rows]
        Path(__file__).with_name(f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
