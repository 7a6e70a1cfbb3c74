//! What each verb does, apart from its flags.

pub mod quantize;
