"""All mutants, by area."""

from collections import Counter

from experiments.mutants import (
    bugs_answers,
    bugs_base,
    bugs_chat,
    bugs_checkpoint,
    bugs_continuing,
    bugs_data,
    bugs_documents,
    bugs_forward,
    bugs_heldout,
    bugs_hypernetwork,
    bugs_internalizing,
    bugs_lora,
    bugs_losses,
    bugs_masks,
    bugs_optimizer,
    bugs_packing,
    bugs_perceiver,
    bugs_processes,
    bugs_rare_paths,
    bugs_trainer,
)
from experiments.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *(
        *bugs_hypernetwork.MUTANTS,
        *bugs_perceiver.MUTANTS,
        *bugs_lora.MUTANTS,
        *bugs_forward.MUTANTS,
        *bugs_losses.MUTANTS,
    ),
    *(*bugs_trainer.MUTANTS, *bugs_optimizer.MUTANTS, *bugs_data.MUTANTS, *bugs_packing.MUTANTS, *bugs_chat.MUTANTS),
    *(*bugs_documents.MUTANTS, *bugs_heldout.MUTANTS, *bugs_internalizing.MUTANTS),
    *(
        *bugs_base.MUTANTS,
        *bugs_masks.MUTANTS,
        *bugs_checkpoint.MUTANTS,
        *bugs_continuing.MUTANTS,
        *bugs_answers.MUTANTS,
        *bugs_processes.MUTANTS,
        *bugs_rare_paths.MUTANTS,
    ),
)

_twice = [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
assert not _twice, f"a mutant's name is its own: {_twice}"
