"""The times of layers by width on this machine, for a plan of a speed-up."""

from dataclasses import replace

import torch

from actors.layer_units.reads import Reads
from actors.layer_units.times import times
from actors.messages import CompressionJob, UnitTask
from actors.storage.files import Directory
from orchestrator.prepare.prepared import Prepared
from planners.model.serving_load import LayerTimes, times_from


def layer_times(prepared: Prepared) -> LayerTimes:
    """Measure them, as a worker of the run does at its start; nothing is kept.

    Raises:
        PlanError: no cut is as fast as is asked; the message says how fast one can get.
    """
    target, config, plan = prepared.target, prepared.config, prepared.plan
    job = CompressionJob(
        run_uri=config.out,
        checkpoint_uri=prepared.model_uri,
        model_store=config.model_store,
        method=prepared.spec.name,
        options=prepared.options,
        shape=plan.shape,
        form=plan.form,
        tokens="",
        batching=prepared.identity.batching,
        load=target.load,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        task = UnitTask(unit="times", kind="times", index=-1, inputs=())
        _, values = times(task, job, Directory(config.out), Reads(config.device))
    finally:
        torch.set_num_threads(before)
    found = times_from(values["times"])
    prepared.spec.form(plan.shape, prepared.start, replace(target, times=found), prepared.options)
    return found
