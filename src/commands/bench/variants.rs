//! Policies that are measured by turns on one loaded model, so that all meet the same machine.

use crate::backend::Tuning;
use crate::commands::Failure;
use crate::commands::args::ComputeArgs;
use crate::commands::load;
use crate::engine::Engine;
use crate::planning::PolicyConfig;
use crate::planning::placement::Placement;

/// No expert in VRAM.
pub const NONE: &str = "none";

/// A policy on offer with `--against`: its name, or no expert in VRAM.
#[derive(Clone, Debug, PartialEq)]
pub enum Rival {
    Policy(PolicyConfig),
    Nothing,
}

impl std::str::FromStr for Rival {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            NONE => Ok(Rival::Nothing),
            name => name
                .parse()
                .map(Rival::Policy)
                .map_err(|error| format!("{error}, or {NONE} for no expert in VRAM")),
        }
    }
}

impl Rival {
    fn name(&self) -> &'static str {
        match self {
            Rival::Policy(policy) => policy.name(),
            Rival::Nothing => NONE,
        }
    }

    fn flags(&self, compute: &ComputeArgs) -> ComputeArgs {
        let (cpu_moe, policy) = match self {
            Rival::Policy(policy) => (false, Some(*policy)),
            Rival::Nothing => (true, None),
        };
        ComputeArgs {
            cpu_moe,
            policy,
            ..compute.clone()
        }
    }
}

/// What is measured: the run that the flags ask for, and its rivals.
pub struct Variants<'a> {
    placement: &'a Placement,
    all: Vec<Variant>,
}

struct Variant {
    /// Of a rival
    name: Option<&'static str>,
    /// With which it would run alone
    flags: ComputeArgs,
    tuning: Option<Tuning>,
    /// What the engine said of it
    calibration: Option<Vec<String>>,
    stopped: Option<String>,
}

impl<'a> Variants<'a> {
    /// # Errors
    /// If there are rivals, but no GPU or no cache for them to be another of.
    pub fn new(
        engine: &Engine,
        placement: &'a Placement,
        compute: &ComputeArgs,
        rivals: &[Rival],
    ) -> anyhow::Result<Self> {
        if !rivals.is_empty() && engine.experts().is_none() {
            return Err(Failure::Usage(
                "--against compares with a placement's experts in VRAM, and there are none; it needs a \
                 GPU, and no --cpu-moe"
                    .into(),
            )
            .into());
        }
        let variant = |name, flags| Variant {
            name,
            flags,
            tuning: None,
            calibration: None,
            stopped: None,
        };
        let mut all = vec![variant(None, compute.clone())];
        all.extend((rivals.iter()).map(|r| variant(Some(r.name()), r.flags(compute))));
        Ok(Variants { placement, all })
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// `None` for the run that the flags ask for, which is the first.
    pub fn name(&self, i: usize) -> Option<&'static str> {
        self.all[i].name
    }

    pub fn flags(&self, i: usize) -> &ComputeArgs {
        &self.all[i].flags
    }

    /// Why the cache of variant `i` was stopped, if it was.
    pub fn stopped(&self, i: usize) -> Option<&str> {
        self.all[i].stopped.as_deref()
    }

    /// Puts the engine where variant `i` begins, whatever ran before: the last repetition decoded the
    /// very same text, which a cache would know by now.
    ///
    /// # Errors
    /// The engine's.
    pub fn begin(&mut self, i: usize, engine: &mut Engine) -> anyhow::Result<()> {
        let alone = self.all.len() == 1;
        let variant = &mut self.all[i];
        if alone {
            // As loaded: perhaps from a saved state.
            engine.restart_experts()?;
        } else {
            match load::manager(&variant.flags, self.placement) {
                Some(experts) => engine.place(experts).map(drop)?,
                None => {
                    let slots = self.placement.layers.iter().map(|layer| layer.slots);
                    engine.place_nothing(&slots.collect::<Vec<_>>())?;
                }
            }
            variant.tuning = engine.tune(variant.tuning)?;
            variant
                .calibration
                .get_or_insert_with(|| engine.notes().to_vec());
        }
        // What a first step prepares is no part of a repetition.
        Ok(engine.warm_up()?)
    }

    /// What a reader of variant `i`'s results should know.
    pub fn notes(&self, i: usize, engine: &Engine) -> Vec<String> {
        let variant = &self.all[i];
        let mut notes = match &variant.calibration {
            Some(notes) => notes.clone(),
            None => engine.notes().to_vec(),
        };
        notes.extend(variant.stopped.clone());
        if self.all.len() > 1 {
            let others = self.all.len() - 1;
            notes.push(format!(
                "measured by turns with {others} others on one loaded model"
            ));
        }
        notes
    }

    pub fn end(&mut self, i: usize, engine: &Engine) {
        if let Some(reason) = engine.experts().and_then(|experts| experts.stopped()) {
            self.all[i].stopped = Some(reason.into());
        }
    }
}
