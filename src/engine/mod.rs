pub mod sampler;
pub mod stream;

pub use sampler::{
    SampleError, Sampler, SamplingParams, TokenLogprob, token_logprob, top_logprobs,
};
pub use stream::TextStream;
