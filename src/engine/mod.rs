//! The engine: a loaded model that takes tokens and gives logits, on whatever backend.

pub mod experts;
pub mod footprint;
pub mod generate;
pub mod prefix;
pub mod sampler;
pub mod scheduler;
pub mod service;
pub mod session;
mod slots;
pub mod stream;
pub mod text;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::backend::cpu::{Cpu, CpuOptions, CpuPrecision, Progress};
use crate::backend::reference::Reference;
use crate::backend::{
    BackendError, BackendFacts, BlockExecutor, DecodeTimes, Executor, KernelTimes, KvDtype,
    LoadRates, LogitRows, ModelShape, ModelWeights, NextLogits, OnRouting, Piece, VramHeld,
    VramMeter,
};
use crate::formats::{Checkpoint, FormatError, ModelId};
use crate::hardware::GpuProbe;
use crate::model::weights;
use crate::model::{
    ChatError, GenerationConfigError, ModelConfig, Source, SourceError, Tokenizer, TokenizerError,
    TokenizerFilesError,
};
use crate::planning::execution::PrefillSettings;
use experts::ExpertManager;
use prefix::PrefixCache;
use session::{PromptIn, Session};

pub use crate::backend::Residency;
pub use sampler::{
    SampleError, Sampler, SamplingParams, TokenLogprob, token_logprob, top_logprobs,
};
pub use stream::TextStream;
pub use text::TextModel;

/// Which backend computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The fastest this machine has
    #[default]
    Auto,
    Reference,
    Cpu,
    /// The GPU of this number, and the CPU beside it
    Cuda(usize),
}

impl BackendChoice {
    /// What `auto` means on this machine, in this build; others are what they say.
    pub fn resolve(self) -> Self {
        match self {
            BackendChoice::Auto => fastest(),
            chosen => chosen,
        }
    }
}

impl FromStr for BackendChoice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "auto" => Ok(BackendChoice::Auto),
            "cpu" => Ok(BackendChoice::Cpu),
            "reference" => Ok(BackendChoice::Reference),
            "cuda" => Ok(BackendChoice::Cuda(0)),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(BackendChoice::Cuda)
                .ok_or_else(|| {
                    format!("unknown backend `{name}`; expected auto, cuda[:N], cpu or reference")
                }),
        }
    }
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendChoice::Auto => f.write_str("auto"),
            BackendChoice::Reference => f.write_str("reference"),
            BackendChoice::Cpu => f.write_str("cpu"),
            BackendChoice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// What a GPU may hold, and what of it experts get.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// All the process may hold there, its context included; all that is free if not given
    pub vram_bytes: Option<u64>,
    pub residency: Residency,
    pub prefill: PrefillSettings,
    /// Of `m` missing experts, the GPU reads `split[m]` over PCIe; none if not given
    pub split: Option<Vec<i32>>,
    /// Whether the CPU fetches experts early; measured if not given
    pub look_ahead: Option<bool>,
    /// Whether the CPU computes the output head, from RAM
    pub head_in_ram: bool,
}

/// How to load a model.
#[derive(Clone)]
pub struct LoadOptions<'a> {
    pub backend: BackendChoice,
    /// Worker threads; all usable cores if `None`
    pub threads: Option<usize>,
    pub cpu_precision: CpuPrecision,
    pub gpu: GpuOptions,
    /// Of backends that have a choice; their own default if `None`
    pub kv_dtype: Option<KvDtype>,
    /// Told the stored bytes packed so far and in all
    pub progress: Progress<'a>,
    /// Room for this many tokens, prompt and answer together
    pub max_tokens: usize,
}

/// Why a model could not be loaded or driven.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{location}: {source}")]
    Weights {
        location: String,
        source: FormatError,
    },
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    TokenizerFiles(#[from] TokenizerFilesError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    BadChatTemplate(Arc<ChatError>),
    #[error(transparent)]
    GenerationConfig(Arc<GenerationConfigError>),
    #[error(transparent)]
    Sampler(#[from] SampleError),
    #[error("{location}: has no chat template; use a prompt without --chat and --system")]
    NoChatTemplate { location: String },
    #[error("token id {id} is not in the vocabulary of {vocab_size}")]
    TokenId { id: u32, vocab_size: usize },
    #[error(
        "context of {asked} tokens is above the model's {limit} (max_position_embeddings); \
         lower --ctx"
    )]
    Context { asked: usize, limit: usize },
    #[error("this sequence is parked; bring it back before it is fed")]
    Parked,
    #[error("the prompt is empty; generation needs at least one token to start from")]
    EmptyPrompt,
}

pub type Result<T> = std::result::Result<T, EngineError>;

/// [`weights::load`], with errors that also name the checkpoint.
fn load_weights(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<ModelWeights> {
    weights::load(checkpoint, config).map_err(|error| match error {
        // It says from where.
        FormatError::Missing { .. } => error.into(),
        source => EngineError::Weights {
            location: checkpoint.location().into(),
            source,
        },
    })
}

fn check_ids(ids: &[u32], vocab_size: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(EngineError::TokenId { id, vocab_size }),
        None => Ok(()),
    }
}

/// What `auto` means on this machine, in this build.
fn fastest() -> BackendChoice {
    #[cfg(feature = "emulate")]
    if std::env::var_os("MOECTL_EMULATE").is_some_and(|v| v != "0") {
        return BackendChoice::Cuda(0);
    }
    #[cfg(feature = "cuda")]
    if crate::backend::cuda::driver::device_count().is_some_and(|count| count > 0) {
        return BackendChoice::Cuda(0);
    }
    BackendChoice::Cpu
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
fn cuda(
    index: usize,
    config: &ModelConfig,
    weights: &ModelWeights,
    options: &LoadOptions,
) -> Result<Box<dyn Executor>> {
    use crate::backend::cuda::{Cuda, CudaOptions};
    let gpu = options.gpu.clone();
    let cuda_options = CudaOptions {
        threads: options.threads,
        vram_bytes: gpu.vram_bytes,
        cpu_precision: options.cpu_precision,
        kv_dtype: options.kv_dtype,
        residency: gpu.residency,
        prefill: gpu.prefill,
        split: gpu.split,
        look_ahead: gpu.look_ahead,
        parts: None,
        head_in_ram: gpu.head_in_ram,
    };
    let shape = config.shape.clone();
    let (room, progress) = (options.max_tokens, options.progress);
    let cuda = Cuda::new(index, shape, weights, cuda_options, room, progress)?;
    Ok(Box::new(cuda))
}

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
fn cuda(
    index: usize,
    _: &ModelConfig,
    _: &ModelWeights,
    _: &LoadOptions,
) -> Result<Box<dyn Executor>> {
    Err(BackendError::Other(format!(
        "this build has no kernels for cuda:{index}; run scripts/setup-cuda.sh and build with \
         --features cuda, or use --backend cpu"
    ))
    .into())
}

/// What is kept of beginnings, unless it is set: 24 snapshots of an 80B model.
pub const DEFAULT_PREFIX_CACHE_BYTES: usize = 2 << 30;

/// A model in memory.
pub struct Engine {
    executor: Box<dyn Executor>,
    /// The sequence of whoever needs no more than one
    own: Option<Session>,
    prefix: PrefixCache,
    prompt_in: Option<PromptIn>,
    /// Whether a session was opened before
    opened: bool,
    /// Decides which experts are in VRAM, once a placement is in force
    experts: Option<ExpertManager>,
    config: ModelConfig,
    text: TextModel,
    model_id: ModelId,
    notes: Vec<String>,
    /// Of those, the ones that are not the backend's, which may change
    own_notes: usize,
}

impl Engine {
    /// Loads config, weights and text of a model.
    ///
    /// # Errors
    /// Anything wrong with the model's files, by file and tensor; a context above the model's.
    pub fn load(source: &Source, options: &LoadOptions) -> Result<Self> {
        let config = source.config()?;
        let limit = config.max_position_embeddings;
        if options.max_tokens > limit {
            return Err(EngineError::Context {
                asked: options.max_tokens,
                limit,
            });
        }
        let text = TextModel::load(source)?;
        let checkpoint = source.checkpoint()?;
        let model_id = source.model_id(Some(&checkpoint))?;
        let weights = load_weights(&checkpoint, &config)?;
        let mut notes = Vec::new();
        if config.synthetic {
            notes.push("synthetic weights: speeds mean something, the text does not".into());
        }
        let mtp_tensors = weights::count_mtp_tensors(&checkpoint);
        if mtp_tensors > 0 {
            notes.push(format!(
                "skipped {mtp_tensors} multi-token-prediction tensors (mtp.*)"
            ));
        }
        let mut executor: Box<dyn Executor> = match options.backend.resolve() {
            BackendChoice::Cuda(index) => cuda(index, &config, &weights, options)?,
            BackendChoice::Auto | BackendChoice::Cpu => {
                let cpu = CpuOptions {
                    threads: options.threads,
                    precision: options.cpu_precision,
                    kv_dtype: options.kv_dtype.unwrap_or_default(),
                };
                let backend = Cpu::new(config.shape.clone(), &weights, cpu, options.progress)?;
                Box::new(BlockExecutor::new(backend, options.max_tokens))
            }
            BackendChoice::Reference => {
                let backend = Reference::new(config.shape.clone(), weights);
                Box::new(BlockExecutor::new(backend, options.max_tokens))
            }
        };
        let own_notes = notes.len();
        notes.extend(executor.diagnostics().map_or_else(Vec::new, |d| d.notes()));
        Ok(Engine {
            executor,
            own: None,
            prefix: PrefixCache::new(DEFAULT_PREFIX_CACHE_BYTES),
            prompt_in: None,
            opened: false,
            experts: None,
            config,
            text,
            model_id,
            notes,
            own_notes,
        })
    }

    pub fn shape(&self) -> &ModelShape {
        &self.config.shape
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn text(&self) -> &TextModel {
        &self.text
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    pub fn model_id(&self) -> &ModelId {
        &self.model_id
    }

    /// What a user should know about this model and did not ask.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    pub fn backend(&self) -> BackendFacts {
        self.executor.facts()
    }

    /// How fast loading was, if the backend measures it.
    pub fn load_rates(&self) -> Option<LoadRates> {
        self.executor.load_rates()
    }

    /// Bytes that decoding one token reads with `context` tokens seen, if the backend knows.
    pub fn decode_read_bytes(&self, context: usize) -> Option<u64> {
        self.executor.decode_read_bytes(context)
    }

    /// Where decode steps spent their time since the last call, if a GPU took part.
    pub fn take_times(&mut self) -> Option<DecodeTimes> {
        self.executor.diagnostics().map(|d| d.take_times())
    }

    /// Measures the GPU with this model; `None` if none takes part. The sequence starts over.
    ///
    /// # Errors
    /// The backend's.
    pub fn measure_gpu(&mut self) -> Result<Option<GpuProbe>> {
        let Some(diagnostics) = self.executor.diagnostics() else {
            return Ok(None);
        };
        let probe = diagnostics.measure(&self.model_id.id)?;
        self.begin()?;
        Ok(Some(probe))
    }

    /// What each GPU kernel takes; the sequence starts over.
    ///
    /// # Errors
    /// The backend's.
    pub fn kernel_times(&mut self) -> Result<KernelTimes> {
        let Some(diagnostics) = self.executor.diagnostics() else {
            return Ok(KernelTimes::default());
        };
        let times = diagnostics.kernel_times()?;
        self.begin()?;
        Ok(times)
    }

    /// Bytes this process holds on the GPU, by the driver's figure.
    pub fn vram_bytes(&self) -> Option<u64> {
        self.executor.device_memory()?.used_bytes().ok()
    }

    /// The same item by item.
    pub fn vram_held(&self) -> Option<VramHeld> {
        self.executor.device_memory()?.held().ok()
    }

    /// The same figure for a thread that watches.
    pub fn vram_meter(&self) -> Option<VramMeter> {
        self.executor.device_memory().map(|memory| memory.meter())
    }

    /// The ids the engine's own sequence has been fed, in order.
    pub fn tokens(&self) -> &[u32] {
        self.own.as_ref().map_or(&[], |session| session.tokens())
    }

    /// Forgets all sequences and makes room for one of `max_tokens`.
    ///
    /// # Errors
    /// A context above the model's; if memory is short.
    pub fn reset(&mut self, max_tokens: usize) -> Result<()> {
        self.reserve(1, max_tokens)?;
        if let Some(experts) = &mut self.experts {
            experts.begin_sequence();
        }
        self.begin()
    }

    /// Makes the engine's own sequence one that has seen a beginning of `prompt`, the longest that is
    /// known, but never all of it: how many tokens.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn resume(&mut self, prompt: &[u32]) -> Result<usize> {
        let seen = self.tokens().len();
        if seen > 0 && seen < prompt.len() && prompt.starts_with(self.tokens()) {
            return Ok(seen);
        }
        if let Some(own) = self.own.take() {
            self.close(own);
        }
        let session = self.open(prompt, &[], 0)?;
        let seen = session.tokens().len();
        self.own = Some(session);
        Ok(seen)
    }

    /// Keeps at most so many bytes of beginnings that sequences had; what is kept now is dropped.
    pub fn set_prefix_cache(&mut self, bytes: usize) {
        self.prefix = PrefixCache::new(bytes);
    }

    /// What is kept of beginnings.
    pub fn prefix_cache(&self) -> &PrefixCache {
        &self.prefix
    }

    /// The executor forgot all sequences: a new one takes the place of the engine's own.
    fn begin(&mut self) -> Result<()> {
        self.own = Some(self.new_session()?);
        Ok(())
    }

    /// Has `work` drive the engine's own sequence.
    fn with_own<T>(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Session) -> Result<T>,
    ) -> Result<T> {
        let mut own = match self.own.take() {
            Some(own) => own,
            None => self.new_session()?,
        };
        let result = work(self, &mut own);
        self.own = Some(own);
        result
    }

    /// Feeds one chunk of tokens to the engine's own sequence; `[rows, vocab_size]` logits.
    ///
    /// # Errors
    /// An id outside the vocabulary, a full context, or a failing backend.
    pub fn forward(
        &mut self,
        ids: &[u32],
        rows: LogitRows,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<Vec<f32>> {
        let decode = ids.len() == 1;
        self.with_own(|engine, own| {
            let piece = Piece::new(engine.resident(own)?, ids, rows);
            let logits = engine.run_piece(own, piece, decode, on_routing)?;
            Ok(all_logits(logits))
        })
    }

    /// As [`forward`](Engine::forward) of one token, for whoever needs only its `wanted` best logits:
    /// a backend that finds them itself need not bring all.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn forward_best(
        &mut self,
        id: u32,
        wanted: usize,
        on_routing: &mut OnRouting<'_>,
    ) -> Result<NextLogits> {
        self.with_own(|engine, own| engine.decode(own, id, Some(wanted), on_routing))
    }

    /// Feeds a prompt to the engine's own sequence in pieces; the logits of its last token.
    ///
    /// `proceed` is asked before each piece with the tokens done so far; `None` is returned when
    /// it says no.
    ///
    /// # Errors
    /// As [`Engine::forward`]; an empty prompt.
    pub fn prefill(
        &mut self,
        ids: &[u32],
        on_routing: &mut OnRouting<'_>,
        proceed: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Vec<f32>>> {
        self.with_own(|engine, own| {
            let before = own.tokens().len();
            let prompt = [own.tokens(), ids].concat();
            while proceed(own.tokens().len() - before) {
                if let Some(logits) = engine.prefill_piece(own, &prompt, on_routing)? {
                    return Ok(Some(logits));
                }
            }
            Ok(None)
        })
    }
}

/// Of a piece that wanted rows.
fn all_logits(logits: NextLogits) -> Vec<f32> {
    match logits {
        NextLogits::All(logits) => logits,
        NextLogits::Best(_) => unreachable!("rows were wanted"),
    }
}
