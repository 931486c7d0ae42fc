"""The witnesses by name: what runs parts of d2l on small inputs and records the numbers that come out."""

from collections.abc import Callable

from experiments.mutants import (
    witnesses_answers,
    witnesses_base,
    witnesses_continuing,
    witnesses_data,
    witnesses_files,
    witnesses_heldout,
    witnesses_internalizing,
    witnesses_model,
    witnesses_processes,
    witnesses_steps,
    witnesses_training,
)
from experiments.mutants.values import Values

WITNESSES: dict[str, Callable[[Values], None]] = {
    function.__name__: function
    for function in (
        *(witnesses_model.lora, witnesses_model.binding, witnesses_training.train, witnesses_training.resume),
        *(
            witnesses_training.losses,
            witnesses_training.optimizer,
            witnesses_training.guards,
            witnesses_training.curriculum,
        ),
        *(witnesses_data.rows, witnesses_data.batches, witnesses_data.cache),
        *(witnesses_data.records, witnesses_data.chat, witnesses_data.needles, witnesses_data.teacher),
        *(
            witnesses_base.mxfp4,
            witnesses_base.experts,
            witnesses_base.grouped,
            witnesses_base.load,
            witnesses_base.masks,
        ),
        *(witnesses_base.memory, witnesses_files.checkpoint, witnesses_files.export, witnesses_files.reference),
        *(witnesses_continuing.continuing, witnesses_continuing.snapshot, witnesses_continuing.smaller_rank),
        witnesses_answers.answers,
        *(witnesses_heldout.heldout, witnesses_heldout.evaluated_run, witnesses_heldout.kept_out),
        *(witnesses_internalizing.internalize, witnesses_internalizing.merging),
        *(witnesses_processes.summed, witnesses_processes.shared_steps, witnesses_processes.sharded),
        *(
            witnesses_steps.pieces,
            witnesses_steps.slices,
            witnesses_steps.stacks,
            witnesses_steps.grouped_lora,
            witnesses_steps.unsound,
            witnesses_steps.cuts,
            witnesses_steps.block_tables,
        ),
    )
}
