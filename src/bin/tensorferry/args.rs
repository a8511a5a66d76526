//! What can be typed.

use crate::{
    bench::{Step, parse_step},
    choices::{
        CodecArg, DurabilityArg, LayoutArg, NpyDtypeArg, OutFormatArg, ReadArg, RehearsalArg,
        WriteArg,
    },
    output::Format,
    units,
};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, builder::BoolishValueParser};
use std::{ffi::OsString, path::PathBuf, time::Duration};
use tensorferry::{
    Lanes, RateLimit,
    source::{Rename, SourceOptions},
};

const EXAMPLES: &str = "\
Examples:
  tensorferry demo                                  see it work: cut off, resumed, verified
  tensorferry push model/ out/model                 convert a folder into .npy files on this machine
  tensorferry serve /data                           receive checkpoints into /data
  tensorferry push model/ ferry://lab:7744/run7     send one there; run it again to resume
  tensorferry push shard-*.safetensors lab:run7     several files make one checkpoint
  tensorferry list lab:                             what is there, what is unfinished
  tensorferry status lab:run7                       how far that one is
  tensorferry verify /data/run7                     re-read every byte and compare
  tensorferry export /data/run7 run7.safetensors    one file of it, or shards, or a .npz
  tensorferry bench /data                           what this disk can do, and what limits a push

Exit status:
    0  done                          7  not allowed, or not configured
    1  other failure                 8  no space or quota on the receiver
    2  wrong usage                   9  something of that name exists
    3  source missing               11  busy, or taken over by another transfer
    5  network; run it again        24  the source changed while it was sent
    6  damaged bytes               130  interrupted (Ctrl-C)";

/// Moves ML checkpoints between machines into memory-mappable .npy files.
///
/// Every byte is verified, what is acknowledged is durable, and whatever
/// interrupts a push, the same command carries on where the receiver's disk
/// stands. Standard output carries data, standard error carries talk. Every flag
/// can also be set as an environment variable TENSORFERRY_<FLAG>.
#[derive(Debug, Parser)]
#[command(name = "tensorferry", version, after_long_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Flags of every verb.
#[derive(Debug, Args)]
pub(crate) struct GlobalArgs {
    /// How to speak: `human` for people, `json` for programs (one object per line
    /// with an `event` key), `quiet` for nothing but the bare answer and errors
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "human",
        env = "TENSORFERRY_FORMAT"
    )]
    format: Format,
    /// Log to standard error what goes on; twice or thrice for more. RUST_LOG is
    /// honoured
    #[arg(short, long, global = true, action = ArgAction::Count, env = "TENSORFERRY_VERBOSE")]
    pub(crate) verbose: u8,
    /// The same as --format quiet; beside --format json only standard error falls
    /// silent
    #[arg(short, long, global = true, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_QUIET")]
    quiet: bool,
}

impl GlobalArgs {
    /// `-q` beside JSON silences the talk only.
    pub(crate) fn format(&self) -> Format {
        match self.format {
            Format::Human if self.quiet => Format::Quiet,
            format => format,
        }
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.quiet || self.format == Format::Quiet
    }
}

/// The format that a command line asks for which cannot be understood as a whole.
pub(crate) fn format_of(words: impl Iterator<Item = OsString>) -> Format {
    let mut asked = std::env::var_os("TENSORFERRY_FORMAT");
    let mut words = words.skip(1).take_while(|word| word != "--");
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--format") => asked = words.next(),
            Some(word) if word.starts_with("--format=") => {
                asked = Some(word["--format=".len()..].into());
            }
            _ => {}
        }
    }
    let asked = asked.and_then(|word| Format::from_str(word.to_str()?, false).ok());
    asked.unwrap_or(Format::Human)
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Serve(ServeArgs),
    Push(PushArgs),
    Pull(PullArgs),
    Copy(CopyArgs),
    List(ListArgs),
    Status(StatusArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Export(ExportArgs),
    Discard(DiscardArgs),
    Bench(BenchArgs),
    Rehearse(RehearseArgs),
    Demo(DemoArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Receive checkpoints into a folder
///
/// The first line on standard output is `listening on ADDRESS:PORT`. Ctrl-C or
/// SIGTERM stops it in good order: what has arrived is made durable first, and
/// senders carry on when it is back. There is no encryption yet, so it listens on
/// this machine only unless --insecure allows more.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Folder for the checkpoints; made if need be
    #[arg(default_value = ".")]
    pub(crate) root: PathBuf,
    /// Address and port to listen on; port 0 picks a free one
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7744",
        env = "TENSORFERRY_LISTEN"
    )]
    pub(crate) listen: String,
    /// Allow to listen beyond this machine although nothing is encrypted and
    /// anybody who can connect can read and write
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_INSECURE")]
    pub(crate) insecure: bool,
    /// Chunk length of new transfers whose sender has no wish: a power of two from
    /// 256K to 8M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_chunk_len, env = "TENSORFERRY_CHUNK")]
    pub(crate) chunk: Option<u32>,
    /// Memory for chunks on their way, all pushes together; each of up to 16 pulls at a
    /// time may have as much
    #[arg(long, value_name = "SIZE", value_parser = units::parse_budget, default_value = "128M", env = "TENSORFERRY_BUDGET")]
    pub(crate) budget: u64,
    /// How chunks get into their files
    #[arg(long, value_enum, default_value = "auto", env = "TENSORFERRY_WRITE")]
    pub(crate) write: WriteArg,
    /// Remove unfinished transfers that nobody has continued for this long: 7d, 12h,
    /// 30m; 0 keeps them for ever
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration, default_value = "7d", env = "TENSORFERRY_STAGING_TTL")]
    pub(crate) staging_ttl: Duration,
    /// Offer a checkpoint that lies elsewhere to `pull`, in any format that push takes;
    /// without NAME under the name of its file or folder. May be given several times
    #[arg(long, value_name = "[NAME=]PATH", env = "TENSORFERRY_EXPORT")]
    pub(crate) export: Vec<OsString>,
    /// Print where each tensor lies as soon as it is complete and durable, so that it can
    /// be mapped while the rest arrives. Files that were named so are read-only
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_READY")]
    pub(crate) ready: bool,
    /// Most bytes of one checkpoint; 0 = as many as there is room for
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "0", env = "TENSORFERRY_QUOTA_CHECKPOINT")]
    pub(crate) quota_checkpoint: u64,
    /// Most bytes of all unfinished transfers together, as announced; 0 = as many as
    /// there is room for
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "0", env = "TENSORFERRY_QUOTA_STAGING")]
    pub(crate) quota_staging: u64,
}

/// Send a checkpoint; run it again to resume
///
/// SRC is a .safetensors, .npy, .npz, .pt, .keras, .h5, .gguf or .onnx file, a
/// *.index.json with its shards, a TensorFlow checkpoint (its name without an ending,
/// its .index, or a folder of them), a SavedModel, a folder of torch.distributed, a
/// folder of these, or a folder that tensorferry has written.
/// Several make one checkpoint. A folder's other files (config.json, tokenizer) go along.
///
/// DEST is ferry://HOST[:PORT]/NAME, or HOST:NAME (port 7744), or a local folder;
/// a local folder with a colon in its name is written ./a:b. A slash at the end
/// changes nothing.
///
/// The first Ctrl-C stops in good order, says how much is safe and how to go on;
/// the second stops at once.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensorferry push model/ out/model                   local: the same path, nothing to set up
  tensorferry push model.safetensors lab:run7 -n      what would be sent, and nothing is
  tensorferry push ckpt/ ferry://lab:7744/run7 --overwrite
  tensorferry push ckpt/ lab:run7 --trainable         the trained variables, without the optimizer
  tensorferry push ckpt/ lab:run7 --include 'decoder/*' --rename 'decoder/*=*'
  tensorferry push ckpt/ lab:run7 --format json | tail -1")]
pub(crate) struct PushArgs {
    /// Files and folders that make up the checkpoint
    #[arg(required = true, value_name = "SRC", num_args = 1..)]
    pub(crate) src: Vec<PathBuf>,
    /// ferry://HOST[:PORT]/NAME, HOST:NAME or a local folder
    #[arg(value_name = "DEST")]
    pub(crate) dest: OsString,
    /// Show which tensor becomes which file, and how many bytes are left to send by what
    /// the receiver has; send and write nothing
    #[arg(short = 'n', long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_DRY_RUN")]
    pub(crate) dry_run: bool,
    /// Leave a folder's other files (config.json, tokenizer) behind
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_NO_FILES")]
    pub(crate) no_files: bool,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
    /// How the source is read
    #[arg(long, value_enum, default_value = "auto", env = "TENSORFERRY_READ")]
    pub(crate) read: ReadArg,
}

/// How a checkpoint travels and what it becomes, whichever side dials.
#[derive(Debug, Args)]
pub(crate) struct TransferArgs {
    /// Replace a published checkpoint of the same name
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_OVERWRITE")]
    pub(crate) overwrite: bool,
    /// Throw unfinished work of that name away first, whoever it belongs to
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_RESTART")]
    pub(crate) restart: bool,
    /// Let the receiver read everything back before it publishes
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_VERIFY")]
    pub(crate) verify: bool,
    /// How the files are named
    #[arg(long, value_enum, default_value = "named", env = "TENSORFERRY_LAYOUT")]
    pub(crate) layout: LayoutArg,
    /// What the receiver writes
    #[arg(
        long,
        value_enum,
        default_value = "npy",
        env = "TENSORFERRY_OUT_FORMAT"
    )]
    pub(crate) out_format: OutFormatArg,
    /// How .npy files name bfloat16 and the 8-bit floats, which numpy has no name for
    #[arg(
        long,
        value_enum,
        default_value = "bytes",
        env = "TENSORFERRY_NPY_DTYPE"
    )]
    pub(crate) npy_dtype: NpyDtypeArg,
    /// How often written bytes become durable
    #[arg(
        long,
        value_enum,
        default_value = "group",
        env = "TENSORFERRY_DURABILITY"
    )]
    pub(crate) durability: DurabilityArg,
    /// Chunk length of a new transfer: a power of two from 256K to 8M [default: the
    /// receiver's]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_chunk_len, env = "TENSORFERRY_CHUNK")]
    pub(crate) chunk: Option<u32>,
    /// Connections to send over: 1 to 16, or `auto` for as many as bring clearly more
    #[arg(
        long,
        value_name = "N",
        default_value = "auto",
        env = "TENSORFERRY_LANES"
    )]
    pub(crate) lanes: Lanes,
    /// Most payload bytes a second as they go on the wire: 10M or 1.5GiB (powers of
    /// 1,024), 5MB (powers of 1,000), `off`; or @FILE, which holds such a rate and is
    /// read again each second
    #[arg(
        long,
        value_name = "RATE",
        default_value = "off",
        hide_default_value = true,
        env = "TENSORFERRY_BWLIMIT"
    )]
    pub(crate) bwlimit: RateLimit,
    /// Bring tensors with names like this before the others, and make each durable as soon
    /// as it is complete; may be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_FIRST")]
    pub(crate) first: Vec<String>,
    /// How chunks are compressed on the way
    #[arg(long, value_enum, default_value = "auto", env = "TENSORFERRY_CODEC")]
    pub(crate) codec: CodecArg,
    /// Attempts in a row that make nothing durable before giving up
    #[arg(
        long,
        value_name = "N",
        default_value_t = 5,
        env = "TENSORFERRY_RETRIES"
    )]
    pub(crate) retries: u32,
    /// Memory for chunks on their way; a local DEST gives half to each side
    #[arg(long, value_name = "SIZE", value_parser = units::parse_budget, default_value = "128M", env = "TENSORFERRY_BUDGET")]
    pub(crate) budget: u64,
}

/// Fetch a checkpoint from a server; run it again to resume
///
/// SRC is ferry://HOST[:PORT]/NAME, or HOST:NAME (port 7744): a checkpoint that was pushed
/// there, or one that the server offers with --export. DIR is a local folder.
///
/// The server is not trusted: names, sizes and checksums are checked as a server checks
/// those of a push, and nothing gets the name DIR before it is complete. The first Ctrl-C
/// stops in good order, says how much is safe and how to go on; the second stops at once.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensorferry pull lab:run7 here/run7
  tensorferry pull ferry://lab:7744/run7 run7 --include 'decoder/*' --max-bytes 20G
  tensorferry pull lab:run7 run7 --out-format safetensors --overwrite")]
pub(crate) struct PullArgs {
    /// ferry://HOST[:PORT]/NAME or HOST:NAME
    #[arg(value_name = "SRC")]
    pub(crate) src: OsString,
    /// The folder that it becomes
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Take only tensors with names like this; `*` is any text, `?` one character. May
    /// be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_INCLUDE")]
    pub(crate) include: Vec<String>,
    /// Leave out tensors with names like this; may be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_EXCLUDE")]
    pub(crate) exclude: Vec<String>,
    /// Refuse a checkpoint of more bytes; 0 = as many as there is room for
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "0", env = "TENSORFERRY_MAX_BYTES")]
    pub(crate) max_bytes: u64,
    /// Print where each tensor lies as soon as it is complete and durable, so that it can
    /// be mapped while the rest arrives; without it those of --first only. Files that were
    /// named so are read-only
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_READY")]
    pub(crate) ready: bool,
    /// How chunks get into their files
    #[arg(long, value_enum, default_value = "auto", env = "TENSORFERRY_WRITE")]
    pub(crate) write: WriteArg,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
}

/// Copy a checkpoint from one server to another; run it again to resume
///
/// SRC and DEST are ferry://HOST[:PORT]/NAME, or HOST:NAME (port 7744). The bytes pass
/// through the memory of this machine, a few chunks at a time, and never touch its disk:
/// the server of DEST checks them, makes them durable and publishes them.
///
/// The first Ctrl-C stops in good order, says how much is safe and how to go on; the second
/// stops at once.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensorferry copy ferry://lab/run7 ferry://archive:9000/runs/7
  tensorferry copy lab:run7 archive:run7-decoder --include 'decoder.*'")]
pub(crate) struct CopyArgs {
    /// Where it is: ferry://HOST[:PORT]/NAME or HOST:NAME
    #[arg(value_name = "SRC")]
    pub(crate) src: OsString,
    /// Where it goes: the same of another server, or another name
    #[arg(value_name = "DEST")]
    pub(crate) dest: OsString,
    /// Take only tensors with names like this; `*` is any text, `?` one character. May
    /// be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_INCLUDE")]
    pub(crate) include: Vec<String>,
    /// Leave out tensors with names like this; may be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_EXCLUDE")]
    pub(crate) exclude: Vec<String>,
    #[command(flatten)]
    pub(crate) transfer: TransferArgs,
}

/// Which tensors are taken, and what they are called.
#[derive(Debug, Args)]
pub(crate) struct SelectArgs {
    /// Take only tensors with names like this; `*` is any text, `?` one character. May
    /// be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_INCLUDE")]
    include: Vec<String>,
    /// Leave out tensors with names like this; may be given several times
    #[arg(long, value_name = "GLOB", env = "TENSORFERRY_EXCLUDE")]
    exclude: Vec<String>,
    /// Take only what the source says is trainable, in the order of its model
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_TRAINABLE")]
    trainable: bool,
    /// Give tensors other names: `*` in OLD is any text, and each `*` in NEW is that
    /// text again. The first that fits counts; may be given several times
    #[arg(long, value_name = "OLD=NEW", env = "TENSORFERRY_RENAME")]
    rename: Vec<Rename>,
}

impl SelectArgs {
    /// Whether anything is asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.trainable
            || !(self.include.is_empty() && self.exclude.is_empty() && self.rename.is_empty())
    }

    /// The same for the library.
    pub(crate) fn options(self, include_files: bool) -> SourceOptions {
        let mut options = SourceOptions::default();
        options.include_files = include_files;
        options.include = self.include;
        options.exclude = self.exclude;
        options.trainable = self.trainable;
        options.rename = self.rename;
        options
    }
}

/// Show checkpoints and unfinished transfers
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// ferry://HOST[:PORT][/PREFIX], HOST: or a local folder
    #[arg(value_name = "WHERE", default_value = ".")]
    pub(crate) place: OsString,
}

/// Show whether a name is complete, and how far its unfinished transfer is
///
/// TARGET is the DEST of the push. Exit status 3 when there is neither.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// ferry://HOST[:PORT]/NAME, HOST:NAME or a local folder; without a name
    /// (ferry://HOST[:PORT] or HOST:) all unfinished transfers of the server
    #[arg(value_name = "TARGET")]
    pub(crate) target: OsString,
}

/// Show names, dtypes, shapes and sizes of a checkpoint, without loading it
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Files and folders, as for push; or one ferry://HOST[:PORT]/NAME, or HOST:NAME
    /// where no such file exists
    #[arg(required = true, value_name = "SRC")]
    pub(crate) src: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
}

/// Re-read landed checkpoints and compare every byte with the manifest
///
/// Exit status 6 when something is damaged, 3 when there is no manifest. With several
/// folders all are looked at, and the first failure decides.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Folders with a manifest.json
    #[arg(required = true, value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
}

/// Write a checkpoint into one .safetensors or .npz file of this machine
///
/// SRC is what push takes, usually a folder that tensorferry has written: every tensor is
/// compared with its checksum on the way, and nothing damaged gets a name. Side files
/// (config.json, tokenizer) are not part of these formats and stay where they are.
///
/// A .safetensors file needs little-endian elements of a type that the format has a name
/// for; Fortran order becomes C order. A .npz file takes everything that lands, under the
/// types that landed files have. Ctrl-C leaves nothing behind.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensorferry export /data/run7 model.safetensors
  tensorferry export /data/run7 model.safetensors --max-shard 5GB     shards and their index
  tensorferry export /data/run7 model.npz --exclude '*/embeddings'
  tensorferry export model.gguf model.npz --overwrite")]
pub(crate) struct ExportArgs {
    /// Files and folders that make up the checkpoint
    #[arg(required = true, value_name = "SRC", num_args = 1..)]
    pub(crate) src: Vec<PathBuf>,
    /// The file: its ending, .safetensors or .npz, says what it becomes
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) select: SelectArgs,
    /// Most bytes of tensors in one .safetensors file: 5GB, 500M. More become
    /// OUT-00001-of-0000N.safetensors and so on, and OUT.safetensors.index.json [default:
    /// one file]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, env = "TENSORFERRY_MAX_SHARD")]
    pub(crate) max_shard: Option<u64>,
    /// Replace files of the same name
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_OVERWRITE")]
    pub(crate) overwrite: bool,
}

/// Throw away the unfinished transfer of a name; what is published stays
#[derive(Debug, Args)]
pub(crate) struct DiscardArgs {
    /// The DEST of the push: ferry://HOST[:PORT]/NAME, HOST:NAME or a local folder
    #[arg(value_name = "DEST")]
    pub(crate) dest: OsString,
}

/// See it work: a push that is cut off half way, resumed and verified
///
/// Makes a sharded safetensors checkpoint of 256 MiB (or takes SRC), starts a
/// server, pushes through a connection that is cut after half of the bytes, pushes
/// again and compares every byte that landed with the source. Needs about 512 MiB
/// of disk; nothing but this folder is touched.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// A checkpoint of yours instead of a made one
    #[arg(value_name = "SRC")]
    pub(crate) src: Option<PathBuf>,
    /// An empty or new folder to work in [default: a fresh one for temporary files]
    #[arg(long, value_name = "DIR", env = "TENSORFERRY_DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// Measure what this machine can do at most, what tensorferry does, and what limits it
///
/// In a folder: memory, checksums, codecs, fresh pages, syncs and plain TCP, which are
/// the ceilings; then tensorferry itself over 1, 2 and 4 lanes, from memory to memory
/// and from a file to files, as shares of them. All in turn, round by round. On a
/// server: how fast made-up bytes get there; nothing is published, and what was sent is
/// removed. A shared or busy machine shows in the range of each figure.
#[derive(Clone, Debug, Args)]
#[command(after_long_help = "\
Examples:
  tensorferry bench /data                             the disk that /data is on
  tensorferry bench /dev/shm --rounds 5 --out bench.svg --format json
  tensorferry bench . --only tcp_file,file_to_file    only these
  tensorferry bench ferry://lab:7744                  the way to a server")]
pub(crate) struct BenchArgs {
    /// Folder to work in, or ferry://HOST[:PORT]
    #[arg(value_name = "WHERE", default_value = ".")]
    pub(crate) place: OsString,
    /// Bytes that each measurement moves [default: what takes about a minute and fits,
    /// at most 1G; 256M to a server]
    #[arg(long, value_name = "SIZE", value_parser = parse_bench_bytes, env = "TENSORFERRY_BYTES")]
    pub(crate) bytes: Option<u64>,
    /// How often everything is measured; medians count
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), default_value_t = 3, env = "TENSORFERRY_ROUNDS")]
    pub(crate) rounds: u32,
    /// Measure at once. Otherwise everything happens once before, unmeasured: programs
    /// and files are read from disk then
    #[arg(long, value_parser = BoolishValueParser::new(), env = "TENSORFERRY_NO_WARM_UP")]
    pub(crate) no_warm_up: bool,
    /// Nothing but these, by the names in the table
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_step, env = "TENSORFERRY_ONLY")]
    pub(crate) only: Vec<Step>,
    /// A file to send instead of a made-up one
    #[arg(long, value_name = "FILE", env = "TENSORFERRY_SOURCE")]
    pub(crate) source: Option<PathBuf>,
    /// Draw a chart of the figures
    #[arg(long, value_name = "FILE.svg", env = "TENSORFERRY_OUT")]
    pub(crate) out: Option<PathBuf>,
}

/// Less than one value for each of the tensors cannot be sent.
fn parse_bench_bytes(text: &str) -> Result<u64, String> {
    let bytes = units::parse_size(text)?;
    if bytes < 1 << 20 {
        return Err(format!("{bytes} bytes are too few to measure: at least 1M"));
    }
    // Whole values.
    Ok(bytes / 4 * 4)
}

/// Both sides of a transfer that keeps nothing, for `bench`
#[derive(Debug, Args)]
#[command(hide = true)]
pub(crate) struct RehearseArgs {
    /// What is left out
    #[arg(value_enum)]
    pub(crate) what: RehearsalArg,
    #[command(subcommand)]
    pub(crate) side: RehearseSide,
}

/// A side of a rehearsal.
#[derive(Debug, Subcommand)]
pub(crate) enum RehearseSide {
    /// Receive in a folder that does not exist and will not exist
    Receive {
        /// The folder
        folder: PathBuf,
    },
    /// Send to a receiver of the same kind
    Send {
        /// Where it listens
        address: String,
        /// Connections
        lanes: u32,
        /// How many bytes to make up, or a checkpoint where files are read
        source: String,
    },
}

/// Print a completion script for a shell
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Print the manual page, of the program or of one verb
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Verb, such as push
    #[arg(value_name = "VERB")]
    pub(crate) page: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound_and_every_flag_has_its_variable() {
        let command = Cli::command();
        command.clone().debug_assert();
        let flags = command
            .get_subcommands()
            .chain([&command])
            .flat_map(|c| c.get_opts());
        for flag in flags {
            let name = flag.get_long().unwrap().to_uppercase().replace('-', "_");
            let env = flag.get_env().map(|v| v.to_string_lossy().into_owned());
            assert_eq!(env, Some(format!("TENSORFERRY_{name}")));
        }
    }

    #[test]
    fn the_last_path_is_the_destination() {
        let cli =
            Cli::try_parse_from(["tensorferry", "push", "a", "b", "c", "--chunk", "1M"]).unwrap();
        let Verb::Push(push) = cli.verb else { panic!() };
        assert_eq!(
            (push.src.len(), push.dest.to_str(), push.transfer.chunk),
            (2, Some("c"), Some(1 << 20))
        );
        assert!(Cli::try_parse_from(["tensorferry", "push", "a"]).is_err());
    }
}
