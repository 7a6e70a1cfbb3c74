//! Which experts get the VRAM that dense weights, states and workspace leave.

#[derive(Clone, Debug, Default, PartialEq)]
pub enum Residency {
    /// As many as fit, spread evenly over layers
    #[default]
    Fill,
    /// None: every expert is computed by the CPU
    Nothing,
    /// Of each layer these, most wanted first, as far as they fit; then as `Fill`
    Preferred(Vec<Vec<u16>>),
    /// Exactly these (layer, expert)
    Exactly(Vec<(usize, usize)>),
    /// `[layer][slot]`, as far as they fit: what each slot holds at first
    Slots(Vec<Vec<Option<u16>>>),
}

/// What routers look a layer ahead for: on what the experts of a layer get, the router of the next
/// layer guesses its choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LookAhead {
    /// They don't.
    #[default]
    Nothing,
    /// The CPU fetches what it will probably compute into its caches.
    Caches,
    /// Besides, what the GPU would read over PCIe is copied to it before it asks.
    Copies,
}
