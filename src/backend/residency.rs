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
