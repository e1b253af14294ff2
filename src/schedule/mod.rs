//! Who goes next: the order of the calls that wait, fair between flows, with limits at every level.

mod calls;
mod fair;
#[cfg(test)]
mod tests;
mod tree;
