//! [`CallKind`]: which calls use similar amounts.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroU64,
};

/// Which calls are alike, so that what one of them has used tells what the others will use: for example those to the same
/// language model. It is created from a name, of which only a hash is kept.
///
/// ```
/// use tower_outbound::rate::CallKind;
///
/// assert_eq!(CallKind::of("small-model"), CallKind::of("small-model"));
/// assert_ne!(CallKind::of("small-model"), CallKind::of("large-model"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallKind(NonZeroU64);

impl CallKind {
    /// Returns the kind with this name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        Self(NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MAX))
    }
}
