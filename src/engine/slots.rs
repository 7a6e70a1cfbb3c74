//! The engine's slots in VRAM: filled, changed, resized and measured as the manager of experts says.

use super::experts::ExpertManager;
use super::{Engine, Result};
use crate::backend::Tuning;

/// Experts that are copied together: 2 ms over PCIe at 1.8 MB.
const CHANGES_AT_ONCE: usize = 64;

impl Engine {
    /// Puts experts where `manager` says, and lets it change that from token to token.
    ///
    /// How many of its slots there is room for; `None` without a GPU, which ignores it.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn place(&mut self, manager: ExpertManager) -> Result<Option<usize>> {
        let Some(slots) = self.executor.expert_slots() else {
            return Ok(None);
        };
        let fitting = slots.place(&manager.contents())?;
        self.experts = Some(manager);
        Ok(Some(fitting))
    }

    /// Another ceiling for what the process holds on the GPU: slots go, or are added, and sequences stay.
    /// How many slots there are then; `None` without a GPU.
    ///
    /// - `picks`: `[layer][expert]` of the router so far, for what new slots begin with
    ///
    /// # Errors
    /// If what must be on the GPU needs more than that; everything is then as it was.
    pub fn set_vram_budget(
        &mut self,
        vram_bytes: u64,
        picks: &[Vec<u64>],
    ) -> Result<Option<usize>> {
        let Some(slots) = self.executor.expert_slots() else {
            return Ok(None);
        };
        let room = slots.set_budget(vram_bytes)?;
        let Some(manager) = &mut self.experts else {
            return Ok(Some(room));
        };
        let resized = manager.resized(room, picks);
        let fitting = slots.place(&resized.contents())?;
        *manager = resized;
        Ok(Some(fitting))
    }

    /// Has the experts' cache bring in what a prompt used most.
    pub(super) fn prompt_ended(&mut self) -> Result<()> {
        if let Some(experts) = &mut self.experts {
            experts.prompt_ended();
        }
        self.change_slots()
    }

    /// Starts the copies that the experts' cache asked for.
    pub(super) fn change_slots(&mut self) -> Result<()> {
        let changes = self.experts.as_mut().map(ExpertManager::take_changes);
        let (Some(changes), Some(slots)) = (changes, self.executor.expert_slots()) else {
            return Ok(());
        };
        // A backend tells of copies call by call: the first need not wait for the last of many.
        for some in changes.chunks(CHANGES_AT_ONCE) {
            slots.change(some)?;
        }
        Ok(())
    }

    /// Puts experts back where the placement, or the state that was restored, had them, and forgets what
    /// was recorded since: for measurements that must not know each other.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn restart_experts(&mut self) -> Result<()> {
        if let (Some(manager), Some(slots)) = (&mut self.experts, self.executor.expert_slots())
            && manager.config().is_dynamic()
        {
            manager.start_over();
            slots.place(&manager.contents())?;
        }
        Ok(())
    }

    /// Empties the slots, so many of each layer: every expert is computed from RAM.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn place_nothing(&mut self, slots: &[usize]) -> Result<()> {
        let empty: Vec<Vec<Option<u16>>> = slots.iter().map(|&n| vec![None; n]).collect();
        self.experts = None;
        if let Some(slots) = self.executor.expert_slots() {
            slots.place(&empty)?;
        }
        Ok(())
    }

    /// See [`Diagnostics::tune`](crate::backend::Diagnostics::tune); `None` too where no GPU takes part.
    /// The sequence starts over where something was measured.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn tune(&mut self, tuning: Option<Tuning>) -> Result<Option<Tuning>> {
        let Some(diagnostics) = self.executor.diagnostics() else {
            return Ok(None);
        };
        let known = tuning.is_some();
        let tuning = diagnostics.tune(tuning)?;
        self.notes.truncate(self.own_notes);
        self.notes.extend(diagnostics.notes());
        if !known {
            self.begin()?;
        }
        Ok(tuning)
    }

    /// Prepares what the first decode step would. The sequence starts over.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn warm_up(&mut self) -> Result<()> {
        let Some(diagnostics) = self.executor.diagnostics() else {
            return Ok(());
        };
        diagnostics.warm_up()?;
        self.begin()
    }

    /// The same, to be changed.
    pub fn experts_mut(&mut self) -> Option<&mut ExpertManager> {
        self.experts.as_mut()
    }

    /// The cache of a placement, if one was placed.
    pub fn experts(&self) -> Option<&ExpertManager> {
        self.experts.as_ref()
    }
}
