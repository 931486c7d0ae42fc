"""Mutants of runs in several processes: sums of gradients, shares of steps, and a sharded base."""

from experiments.mutants.mutant import bugs

_AREA = "several processes"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.train.gradients:SummedGradients._start",
        "summed",
        (
            "sums-of-copies",
            "distributed.all_reduce(flat, async_op=True)",
            "distributed.all_reduce(flat.clone(), async_op=True)",
            "each process trains on its own gradients, and they drift apart",
        ),
        (
            "second-bucket-not-summed",
            "distributed.all_reduce(flat, async_op=True)",
            "distributed.all_reduce(flat.clone() if len(self._sums) == 1 else flat, async_op=True)",
            "parameters of one bucket drift apart",
        ),
        (
            "sums-divided-by-processes",
            "distributed.all_reduce(flat, async_op=True)",
            "distributed.all_reduce(flat.div_(distributed.get_world_size()), async_op=True)",
            "losses are divided by counts of all processes already",
        ),
        (
            "largest-instead-of-sum",
            "distributed.all_reduce(flat, async_op=True)",
            "distributed.all_reduce(flat, distributed.ReduceOp.MAX, async_op=True)",
            "another gradient, the same in all processes",
        ),
        (
            "parts-in-another-order",
            "zip(bucket, flat.split([it.numel() for it in bucket]), strict=True)",
            "zip(bucket, flat.flip(0).split([it.numel() for it in bucket]), strict=True)",
            "gradients of other values, the same in all processes",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.gradients:SummedGradients.during",
        "summed",
        (
            "last-bucket-left-out",
            "len(self._buckets):\n            self._start()\n        for work",
            "len(self._buckets) - 1:\n            self._start()\n        for work",
            "a bucket with a parameter without gradient is not summed",
            "outside the claims: every parameter has a gradient where a preflight is green (GRD204)",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.loop:Trainer._accumulate",
        "shared_steps",
        (
            "first-micro-batch-summed-alone",
            "number == len(own)",
            "number == 1",
            "the other micro-batches stay each process's own",
        ),
        ("every-micro-batch-summed", "and number == len(own)", "and number", "earlier micro-batches are summed twice"),
        (
            "all-read-the-first-share",
            "batches[rank::count]",
            "batches[::count]",
            "a share is read twice, another never",
        ),
        (
            "metrics-of-several-averaged",
            'reduce(sums, reduction="sum")',
            'reduce(sums, reduction="mean")',
            "the logged loss is half of what it is, and a request to stop is half a one",
        ),
        (
            "metrics-of-one-process",
            'return reduce(sums, reduction="sum") if count > 1 else sums',
            "return sums",
            "the logged loss is one process's part, and they do not stop together",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.loop:Trainer._next_batches",
        "shared_steps",
        (
            "as-many-micro-batches-as-one-takes",
            "self.config.gradient_accumulation_steps * self.processes.num_processes",
            "self.config.gradient_accumulation_steps",
            "each process takes half of what it was told to",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.loop:Trainer._epoch_batches",
        "shared_steps",
        (
            "packed-by-each-for-itself",
            "epoch_batches(self.config, self.rows, self.epoch, among)",
            "epoch_batches(self.config, self.rows, self.epoch + self.processes.process_index, among)",
            "documents are read twice or never, and counted by other shares",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.loop:Trainer.step",
        "shared_steps",
        (
            "normalised-by-the-own-share",
            "Normalizer.of(batches, self.config.lora_r)",
            "Normalizer.of(batches[self.processes.process_index :: self.processes.num_processes], self.config.lora_r)",
            "gradients are sums of means",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.build:build_model",
        "shared_steps",
        (
            "weights-of-each-process",
            "manual_seed(config.seed)",
            "manual_seed(config.seed + (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0))",
            "every process trains another hypernetwork with the sum of all gradients",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.build:build_base",
        "sharded",
        (
            "sharding-forgotten",
            'config.base_sharding == "none" or processes is None',
            "True",
            "every process holds the whole base, which does not fit",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.sharding:_shard",
        "sharded",
        (
            "layers-stay-gathered",
            "fully_shard(unit, mesh=mesh)",
            "fully_shard(unit, mesh=mesh, reshard_after_forward=False)",
            "the whole base is there at the end of a forward pass",
        ),
        ("root-alone-sharded", "(*sharding_units(base), base)", "(base,)", "the whole base is gathered for a pass"),
        (
            "last-units-left-to-the-root",
            "(*sharding_units(base), base)",
            "(*sharding_units(base)[:-3], base)",
            "parts of the base are there from first to last",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.sharding:sharding_units",
        "sharded",
        (
            "every-other-layer",
            "*decoder_layers(base),",
            "*decoder_layers(base)[::2],",
            "half of the layers are there from first to last",
        ),
        (
            "embeddings-and-head-left-to-the-root",
            "*([] if embeddings.weight is head.weight else [embeddings, head])",
            "",
            "the largest matrices are there from first to last",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.sharding:_make_room",
        "sharded",
        (
            "buffers-not-computed",
            "buffer.copy_(kept[name])",
            "buffer.zero_()",
            "positions are not turned",
        ),
        (
            "buffers-of-the-first-process",
            "buffer.copy_(kept[name])",
            "buffer.copy_(kept[name] if distributed.get_rank() == 0 else torch.zeros_like(buffer))",
            "positions are turned in one process alone",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.base.sharding:load_sharded_base",
        "sharded",
        (
            "sharded-base-trains",
            ".requires_grad_(False).eval()",
            ".eval()",
            "the frozen base takes gradients, which are reduced and kept",
        ),
        (
            "shares-not-filled",
            "    set_model_state_dict(base, weights, options=options)\n",
            "    for parameter in base.parameters():\n        parameter.to_local().zero_()\n",
            "a base of zeros",
        ),
        (
            "shares-rounded",
            "    set_model_state_dict(base, weights, options=options)\n",
            "    weights = {name: it.bfloat16().to(it.dtype) for name, it in weights.items()}\n"
            "    set_model_state_dict(base, weights, options=options)\n",
            "a base of other weights",
        ),
        ("tie-lost", "    base.tie_weights()\n", "", "embeddings and head are two weights"),
        (
            "whole-behind-the-backward",
            "    return base\n",
            "    base.set_reshard_after_backward(False)\n    return base\n",
            "the whole base is there behind a step",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.encoder:ContextEncoder._read_documents",
        "sharded",
        (
            "layer-that-is-not-run-gathered",
            ", prepend=True",
            "",
            "a layer is gathered for a pass that ends before it, and kept",
        ),
    ),
]
