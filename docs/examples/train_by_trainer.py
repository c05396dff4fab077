# pyright: reportPrivateImportUsage=false
"""Fine-tunes a mixture of experts on a JSONL of messages by transformers' Trainer; a second start resumes:

torchrun --nproc-per-node 4 docs/examples/train_by_trainer.py MODEL chats.jsonl OUT
"""

import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from moe_dist.hf.ep.resume import ExactResume  # also registers ep_implementation="moe_dist"
from moe_dist.monitor.attached.trainer import RecordRouting

folder, chats, out = sys.argv[1:]
ranks = int(os.environ["WORLD_SIZE"])


class ResumableTrainer(ExactResume, Trainer): ...  # saves and loads the optimizer of sharded experts


def tokenized(row):
    """The loss counts the tokens of the last answer."""
    prompt, whole = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=begins, return_dict=True)["input_ids"]
        for messages, begins in ((row["messages"][:-1], True), (row["messages"], False))
    )
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


tokenizer = AutoTokenizer.from_pretrained(folder)
parallel = DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="moe_dist")
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel)
rows = load_dataset("json", data_files=chats, split="train")
arguments = TrainingArguments(
    out,
    max_steps=6,
    save_steps=2,
    logging_steps=1,
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    use_cpu=not torch.cuda.is_available(),
    report_to="tensorboard",
)
trainer = ResumableTrainer(
    model,
    arguments,
    train_dataset=rows.map(tokenized, remove_columns=rows.column_names),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[RecordRouting(pictures_every=2)],  # OUT/routing: records, heat maps, traces
)
# Trainer writes trainer_state.json last, so a checkpoint with this file is whole.
saved = [each.parent for each in Path(out).glob("checkpoint-*/trainer_state.json")]
last = max(saved, key=lambda each: int(each.name.removeprefix("checkpoint-")), default=None)
trainer.train(resume_from_checkpoint=last and str(last))
trainer.save_model(out)
