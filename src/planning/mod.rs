//! What goes where, and how fast that will be: routing statistics, hit curves, plans.
//!
//! Pure: no files, no clock, no GPU, and nothing imported from the rest of the crate. Everything
//! here can be tested with numbers alone, and a plan for another machine needs only its figures.
//!
//! trace -> stats (profile) -> hit curves -> knapsack, by a cost model of a machine -> placement.
//! The policy that is simulated is the object that the engine drives at run time.

mod bits;
pub mod cache;
pub mod codec;
pub mod cost;
pub mod execution;
pub mod footprint;
pub mod hardware;
pub mod knapsack;
pub mod placement;
pub mod planner;
pub mod policy;
pub mod precision;
pub mod profile;
pub mod sharing;
pub mod simulator;
pub mod stack_distance;
pub mod stats;
pub mod trace;
pub mod units;
pub mod validation;

pub use cache::{CacheState, ExpertCache, LayerCounts, StateError, Throttle};
pub use codec::{Tail, TraceError, TraceReader, TraceWriter};
pub use cost::{DecodePrediction, PrefillPrediction, Term};
pub use footprint::{Footprint, KvDtype, ShapeNumbers};
pub use hardware::{Basis, Cpu, Figure, Gpu, Hardware, HardwareError};
pub use placement::{BudgetPoint, MemoryItem, Placement, PlacementError, Tier};
pub use planner::{PlanError, PlanRequest, Planner, RoutingSource, plan};
pub use policy::{Admit, LayerSlots, Offer, Policy, PolicyConfig};
pub use precision::Precision;
pub use profile::{ProfileBody, ProfileError};
pub use simulator::{Outcome, simulate};
pub use stack_distance::{DistanceHistogram, HitCurve, LruStack};
pub use stats::RoutingStats;
pub use trace::{Phase, Picks, Record, RoutingTrace, TraceHeader};
pub use validation::{PolicyScore, ShareScores, Validation};
