//! The options of what is shown during a run, and after it.

#[derive(clap::Args)]
#[command(next_help_heading = "Display")]
pub(crate) struct ViewArgs {
    /// Show problems and the summary only, no progress
    #[arg(long)]
    pub(crate) quiet: bool,
}
