//! What can be measured in a folder, by name.

use tensorferry::measure::Ceiling;

/// Numbers of lanes that are tried.
pub(super) const LANES: [u32; 3] = [1, 2, 4];

/// Something that `--only` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// What the machine can do.
    Ceiling(Ceiling),
    /// What tensorferry does.
    Run(Ends),
}

/// Where the bytes of a run come from and go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    /// Made up on one side, dropped on the other.
    Memory,
    /// From a file into files.
    File,
}

impl Ends {
    pub(super) const ALL: [Ends; 2] = [Ends::Memory, Ends::File];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Ends::Memory => "memory_to_memory",
            Ends::File => "file_to_file",
        }
    }
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) ends: Ends,
    pub(super) lanes: u32,
    pub(super) crc: bool,
}

impl Run {
    /// Every run with these ends.
    pub(super) fn all(ends: Ends) -> impl Iterator<Item = Run> {
        let with = move |crc| LANES.map(|lanes| Run { ends, lanes, crc });
        with(true).into_iter().chain(with(false))
    }
}

/// Reads one name of `--only`.
pub(crate) fn parse_step(name: &str) -> Result<Step, String> {
    let ceilings = Ceiling::ALL.map(|ceiling| (ceiling.name(), Step::Ceiling(ceiling)));
    let runs = Ends::ALL.map(|ends| (ends.name(), Step::Run(ends)));
    let all: Vec<_> = ceilings.into_iter().chain(runs).collect();
    let found = all.iter().find(|(known, _)| *known == name);
    found.map(|(_, step)| *step).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|(known, _)| *known).collect();
        format!("one of {}", names.join(", "))
    })
}
