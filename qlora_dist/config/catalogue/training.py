"""What shows only once the model is there and trains."""

from qlora_dist.config.catalogue.entry import Mendable

TRAINING: dict[str, Mendable] = {
    "tokenizer-of-another-model": Mendable(
        "model.name: the tokenizer of {model} has the token {token} (number {id}), and the model has embeddings for "
        "{embeddings} tokens only",
        "put the tokenizer that belongs to the model into that folder",
    ),
    "out-of-memory": Mendable(
        "rank {rank} ran out of memory on {device} ({error})",
        "lower train.per_device_train_batch_size ({train_batch}), eval.per_device_eval_batch_size ({eval_batch}) or "
        "data.max_length ({max_length}), or set train.gradient_checkpointing=true: the global batch need not change",
    ),
    "host-memory-not-pinned": Mendable(
        "{gib:.1f} GiB of host memory cannot be pinned for activations beside the {taken_gib:.1f} GiB there are "
        "({error})",
        "set train.host_memory_budget_gib to what the host or the job's memory limit allows; 0 keeps all on the GPU",
    ),
    "loss-not-finite": Mendable(
        "the loss or its gradient was not finite in {bad_steps} steps in a row, up to step {step} "
        "(train.max_bad_steps), and the last checkpoint is from before them",
        "lower train.learning_rate or look at the data of these steps, then run the same command again",
    ),
    "packing-without-positions": Mendable(
        "data.packing: {model} takes no position ids, by which documents are kept apart",
        "set data.packing=false",
    ),
    "packing-leaks": Mendable(
        "data.packing: {model} lets the documents of a pack see each other",
        "set data.packing=false",
    ),
}
