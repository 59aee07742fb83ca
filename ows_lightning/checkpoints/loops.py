"""Lightning's training loops, which resume exactly after the last optimizer step."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop, _Loop, _TrainingEpochLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ows_lightning.fit.duration import micro_batches_per_step


def resume_exactly(trainer: Trainer) -> None:
    """Makes a Trainer's ``fit`` resume exactly; call it before the checkpoint is read. A user's own loops stay as they are."""
    if type(trainer.fit_loop) is _FitLoop and type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop:
        trainer.fit_loop.__class__ = ExactFitLoop
        trainer.fit_loop.epoch_loop.__class__ = ExactEpochLoop


class ExactEpochLoop(_TrainingEpochLoop):
    """The loop over an epoch's batches, which a resumed run enters after its last optimizer step.

    Depending on when the checkpoint was saved, Lightning 2.6 skips a validation that was due, counts the last step twice, or,
    at an epoch's last batch, loses or repeats an epoch. Here a resumed epoch's first iteration trains nothing and does all
    that follows a step, whatever the checkpoint was saved in.
    """

    replays_step_end = False  # the next iteration trains nothing, and does what follows a step
    _validated = False
    _unfinished = 0  # batches of a step that had only begun when the checkpoint was saved

    @property
    def done(self) -> bool:
        """False until all that follows the last step has been done."""
        return not self.replays_step_end and super().done

    def reset(self) -> None:
        if not self.replays_step_end:
            super().reset()

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Trains a batch; in the first iteration of a resumed epoch, none."""
        if self.replays_step_end:
            self._skip_next_val = self._validated
            return
        if not self._should_accumulate():
            self.trainer.fit_loop.remember_position()  # type: ignore[attr-defined]
        super().advance(data_fetcher)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        if self.replays_step_end:
            self.replays_step_end = False
            self.set_logged_step(done=True)

    def rewind(self) -> None:
        """Sets the counters back to the end of the last optimizer step: checkpoints hold no gradients."""
        batches: Any = self.batch_progress  # Lightning declares less than its counters have
        # In a checkpoint written at a batch's end, `completed` is one below `processed`. In one written within a step, the
        # last step's validation has already run.
        self._validated = self._unfinished > 0 or batches.current.completed == batches.current.processed
        surplus = self._unfinished
        loader: Any = self.trainer.train_dataloader
        done = getattr(loader, "batches_before", None)  # not what was counted, where the batches have another size now
        if batches.current.processed > surplus and done not in (None, batches.current.processed - surplus):
            rank_zero_info(f"The resumed run has other batches: {done} of {len(loader)} of this epoch count as done")
            surplus = batches.current.processed - done
        for counted in (batches.current, batches.total):
            counted.processed -= surplus
            counted.ready = counted.started = counted.completed = counted.processed
        self._unfinished = 0
        if (of_epoch := self.trainer.num_training_batches) != float("inf"):  # which for a stream changes with max_steps
            batches.is_last_batch = batches.current.processed >= of_epoch

    def set_logged_step(self, done: bool) -> None:
        """Sets the logged step number; without ``done``, the last step does not count yet."""
        if self.trainer.lightning_module.automatic_optimization:
            self._batches_that_stepped = self.global_step - (not done)

    @property
    def within_step(self) -> bool:
        """Whether a batch has come for a step that is not done, as when a checkpoint is saved at an exception."""
        current: Any = self.batch_progress.current
        return current.ready > current.processed or self._should_accumulate()

    def on_save_checkpoint(self) -> dict[str, Any]:
        batches: Any = self.batch_progress
        unfinished = batches.current.processed % self.trainer.accumulate_grad_batches if self.within_step else 0
        return {**super().on_save_checkpoint(), "unfinished": unfinished}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self._unfinished = state_dict.get("unfinished", 0)


class ExactFitLoop(_FitLoop):
    """The loop over epochs, each an `ExactEpochLoop`."""

    epoch_loop: ExactEpochLoop
    _position: Any = None  # the loaders' at the start of the step that is under way

    @property
    def done(self) -> bool:
        return not self.epoch_loop.replays_step_end and super().done

    def remember_position(self) -> None:
        """Remembers the loaders' position at the start of a step."""
        if self._combined_loader is not None:
            self._position = self._combined_loader._state_dicts()

    def on_save_checkpoint(self) -> dict[str, Any]:
        state = super().on_save_checkpoint()
        if self._position and self.epoch_loop.within_step:
            state["combined_loader"] = self._position
        return state

    def setup_data(self) -> None:
        """Makes the loader, and finds out where a resumed run continues: after a step, or at the start of an epoch."""
        super().setup_data()
        if not self._loaded_from_state_dict:  # of a checkpoint's counters, which are interpreted when the data is there
            return
        self._loaded_from_state_dict = False
        _Loop.restarting.fset(self, True)  # type: ignore[attr-defined]  # else the position is not taken over
        self._load_combined_loader_states()
        _Loop.restarting.fset(self, False)  # type: ignore[attr-defined]  # Lightning's own way of going on
        epoch = self.epoch_loop
        epochs: Any = self.epoch_progress
        batches: Any = epoch.batch_progress
        if epochs.current.started < epochs.current.ready:  # saved before an epoch's first batch
            replays_step_end, done = False, epochs.current.processed
        else:
            epoch.rewind()
            over = batches.is_last_batch and epochs.current.processed == epochs.current.ready
            replays_step_end = batches.current.processed > 0 and not over
            done = max(epochs.current.ready - (not over), 0)
            loaders = self._combined_loader.flattened if self._combined_loader is not None else ()
            forgets = loaders and not any(hasattr(loader, "load_state_dict") for loader in loaders)
            if forgets and replays_step_end and not batches.is_last_batch:
                why = "the DataLoader has no load_state_dict (torchdata's StatefulDataLoader has)"
                rank_zero_warn(f"The resumed run begins its epoch with rows that were seen, and misses others: {why}")
        for counted in (epochs.current, epochs.total):
            counted.processed = counted.completed = done
            counted.ready = counted.started = done + replays_step_end
        epoch.replays_step_end = replays_step_end
        epoch.set_logged_step(done=not replays_step_end)

    def on_advance_start(self) -> None:
        """Sets how many batches accumulate in a resumed epoch, which Lightning's callback does at an epoch's start alone."""
        super().on_advance_start()
        if self.epoch_loop.replays_step_end:
            self.trainer.accumulate_grad_batches = micro_batches_per_step(self.trainer, self.trainer.current_epoch)

    def reset(self) -> None:
        super().reset()
        if self.epoch_loop.replays_step_end:
            self._restart_stage = RestartStage.RESTARTED_MID_EPOCH
