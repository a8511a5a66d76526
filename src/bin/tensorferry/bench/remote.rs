//! The bench of a server: how fast made-up bytes get there. They are never finished, so
//! nothing is published; what has arrived is discarded each time.

use super::{
    figures::{Spread, gib_per_s},
    machine::{self, Machine},
    steps::LANES,
};
use crate::{args::BenchArgs, exit::Failure, interrupt::Interrupt, output::Output, units};
use serde::Serialize;
use std::time::{Duration, Instant};
use tensorferry::{
    CheckpointName, Client, Dtype, Error, ErrorCode, OpenPush, PushOptions,
    format::codec::CodecChoice, measure::Noise, protocol::Durability,
};
use tokio::time::sleep;

const BYTES_DEFAULT: u64 = 256 << 20;
/// Longest tensor, and all that lies in memory of each kind of values.
const TENSOR_BYTES: u64 = 64 << 20;
const SMALL_BYTES: u64 = 4096;
const SEED: u64 = 1;
const TICK: Duration = Duration::from_millis(2);
/// A server that takes nothing in for this long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A server notices at once that a push has gone; this is for one that is far and busy.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections by which the way is measured.
const PINGS: usize = 5;
/// HTTP/2 window of a connection: no more is on its way.
const WINDOW_BYTES: f64 = (32u64 << 20) as f64;
/// Beyond this factor one thing is told from another.
const CLEARLY: f64 = 1.3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Data {
    /// Sent as it is.
    Noise,
    /// Encoded on its way.
    Sparse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    data: Data,
    lanes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// Until all was written.
    settled_seconds: f64,
    /// Until all was durable.
    durable_seconds: f64,
    wire_bytes: u64,
    durability: Durability,
}

#[derive(Serialize)]
struct LinkEvent {
    connect_seconds: f64,
    call_seconds: f64,
    small_push_seconds: f64,
}

#[derive(Serialize)]
struct RunEvent<'a> {
    name: &'a str,
    data: &'a str,
    lanes: u32,
    crc: bool,
    durability: &'a str,
    published: bool,
    bytes: u64,
    wire_bytes: u64,
    seconds: f64,
    durable_seconds: f64,
    gib_per_s: f64,
    rounds: Vec<f64>,
}

#[derive(Serialize)]
struct SummaryEvent<'a> {
    version: &'a str,
    date: &'a str,
    server: &'a str,
    machine: &'a Machine,
    bytes: u64,
    rounds: u32,
    sentences: &'a [String],
}

/// The way to a server, and made-up bytes.
struct Way {
    client: Client,
    /// All pushes of this bench, one after the other.
    name: CheckpointName,
    noise: bytes::Bytes,
    sparse: bytes::Bytes,
}

pub(super) async fn run(args: BenchArgs, authority: &str, output: &Output) -> Result<(), Failure> {
    let mut interrupt = Interrupt::listen()?;
    let client = Client::new(authority)?;
    let bytes = args.bytes.unwrap_or(BYTES_DEFAULT);
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let name = format!(
        "tensorferry-bench-{:x}-{:x}",
        std::process::id(),
        now.as_nanos()
    );
    let (noise, sparse) = tokio::task::spawn_blocking(move || {
        let len = bytes.min(TENSOR_BYTES) as usize;
        [Noise::new(SEED), Noise::sparse(SEED)].map(|mut values| {
            let mut bytes = vec![0; len];
            values.fill(&mut bytes);
            bytes::Bytes::from(bytes)
        })
    })
    .await
    .map(Into::into)
    .map_err(|e| Error::Bug(e.to_string()))?;
    let way = Way {
        client,
        name: name.parse()?,
        noise,
        sparse,
    };
    let result = tokio::select! {
        result = Box::pin(way.measure(bytes, args.rounds, output)) => result,
        () = interrupt.first() => {
            output.talk("stopping: what was sent is removed");
            Err(Error::Interrupted)
        }
    };
    // Also what an interrupt or a failure has left.
    let removed = way.discard().await;
    result?;
    Ok(removed?)
}

impl Way {
    async fn measure(&self, bytes: u64, rounds: u32, output: &Output) -> Result<(), Error> {
        let authority = self.client.authority().to_owned();
        output.talk(&format!(
            "sending {} at a time to {}; nothing of it is published",
            units::bytes(bytes),
            units::shown(&authority)
        ));
        let (connect, call) = self.ping().await?;
        let noise = |lanes| Kind {
            data: Data::Noise,
            lanes,
        };
        let mut kinds: Vec<(Kind, Vec<Arrival>)> =
            LANES.map(|lanes| (noise(lanes), Vec::new())).to_vec();
        let sparse = |lanes| Kind {
            data: Data::Sparse,
            lanes,
        };
        kinds.push((sparse(LANES[1]), Vec::new()));
        let mut small = Vec::new();
        // Connections, memory and the server's files are new the first time.
        self.push(noise(1), bytes.min(TENSOR_BYTES)).await?;
        for round in 1..=rounds {
            small.push(self.push(noise(1), SMALL_BYTES).await?.settled_seconds);
            for (kind, arrivals) in &mut kinds {
                let arrival = self.push(*kind, bytes).await?;
                output.talk(&format!(
                    "round {round} of {rounds}: {} {:.2} GiB/s",
                    words_of(*kind),
                    gib_per_s(bytes, arrival.settled_seconds)
                ));
                arrivals.push(arrival);
            }
        }
        let link = LinkEvent {
            connect_seconds: connect,
            call_seconds: call,
            small_push_seconds: Spread::of(small).median,
        };
        tell(&authority, bytes, rounds, &link, &kinds, output);
        Ok(())
    }

    /// Times of a connection and of the shortest call, which connects first.
    async fn ping(&self) -> Result<(f64, f64), Error> {
        let (mut connects, mut calls) = (Vec::new(), Vec::new());
        for _ in 0..PINGS {
            let begun = Instant::now();
            let connected = tokio::net::TcpStream::connect(self.client.authority()).await;
            connected.map_err(|e| Error::Transport {
                endpoint: self.client.authority().to_owned(),
                message: e.to_string(),
            })?;
            connects.push(begun.elapsed().as_secs_f64());
            let begun = Instant::now();
            self.client.list(self.name.as_str()).await?;
            calls.push(begun.elapsed().as_secs_f64());
        }
        Ok((Spread::of(connects).median, Spread::of(calls).median))
    }

    /// Sends bytes until all have arrived and are durable, and removes them.
    async fn push(&self, kind: Kind, bytes: u64) -> Result<Arrival, Error> {
        let mut options = PushOptions::default();
        options.lanes = tensorferry::Lanes::Fixed(kind.lanes);
        options.retries = 0;
        options.codec = match kind.data {
            Data::Noise => CodecChoice::None,
            Data::Sparse => CodecChoice::Auto,
        };
        let memory = match kind.data {
            Data::Noise => &self.noise,
            Data::Sparse => &self.sparse,
        };
        let begun = Instant::now();
        let push = self
            .client
            .push_open(&self.name, self.name.as_str(), options)?;
        for number in 0..bytes.div_ceil(TENSOR_BYTES) {
            let len = TENSOR_BYTES.min(bytes - number * TENSOR_BYTES);
            let name = format!("layer.{number}");
            let part = memory.slice(..len as usize);
            push.add_tensor(&name, Dtype::F32, &[len / 4], part)?;
        }
        let arrival = arrive(push, bytes, begun).await?;
        self.discard().await?;
        Ok(arrival)
    }

    /// The server takes a moment to notice that a push has gone.
    async fn discard(&self) -> Result<(), Error> {
        let begun = Instant::now();
        loop {
            match self.client.discard(&self.name).await {
                Ok(_) => return Ok(()),
                Err(e) if e.code() == ErrorCode::Busy && begun.elapsed() < DISCARD_TIMEOUT => {}
                Err(e) => return Err(e),
            }
            sleep(TICK * 5).await;
        }
    }
}

/// Waits until all bytes are durable. The push is dropped, never finished.
async fn arrive(push: OpenPush, bytes: u64, begun: Instant) -> Result<Arrival, Error> {
    let watcher = push.watcher();
    let mut settled_seconds = None;
    let (mut seen, mut moved) = (0, Instant::now());
    loop {
        let progress = watcher.progress();
        if progress.settled_bytes >= bytes && settled_seconds.is_none() {
            settled_seconds = Some(begun.elapsed().as_secs_f64());
        }
        if let (Some(settled_seconds), true) = (settled_seconds, progress.durable_bytes >= bytes) {
            return Ok(Arrival {
                settled_seconds,
                durable_seconds: begun.elapsed().as_secs_f64(),
                wire_bytes: progress.wire_bytes,
                durability: progress.durability.unwrap_or(Durability::Process),
            });
        }
        let sum = progress.settled_bytes + progress.durable_bytes + progress.wire_bytes;
        if sum > seen {
            (seen, moved) = (sum, Instant::now());
        }
        if push.is_finished() {
            // It fails, for nobody sealed it.
            push.finish().await?;
            return Err(Error::Bug("a push ended before it was finished".to_owned()));
        }
        if moved.elapsed() > STALL_TIMEOUT {
            let seconds = STALL_TIMEOUT.as_secs();
            return Err(Error::Transport {
                endpoint: "the server".to_owned(),
                message: format!("nothing arrived for {seconds} seconds"),
            });
        }
        sleep(TICK).await;
    }
}

fn words_of(kind: Kind) -> String {
    let data = match kind.data {
        Data::Noise => "dense values",
        Data::Sparse => "sparse values, encoded",
    };
    format!("{data}, {}", units::count(kind.lanes.into(), "lane"))
}

fn settled(arrivals: &[Arrival]) -> Spread {
    Spread::of(arrivals.iter().map(|a| a.settled_seconds))
}

fn tell(
    authority: &str,
    bytes: u64,
    rounds: u32,
    link: &LinkEvent,
    kinds: &[(Kind, Vec<Arrival>)],
    output: &Output,
) {
    output.event("link", link);
    let mut rows = vec![
        [
            "to the server",
            "GiB/s",
            "range",
            "on the wire",
            "durable after",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for (kind, arrivals) in kinds {
        let seconds = settled(arrivals);
        let durable = Spread::of(arrivals.iter().map(|a| a.durable_seconds)).median;
        let wire_bytes = arrivals.iter().map(|a| a.wire_bytes).max().unwrap_or(0);
        output.event(
            "run",
            &RunEvent {
                name: "memory_to_server",
                data: match kind.data {
                    Data::Noise => "noise",
                    Data::Sparse => "sparse",
                },
                lanes: kind.lanes,
                crc: true,
                durability: arrivals.first().map_or("", |a| a.durability.as_str()),
                published: false,
                bytes,
                wire_bytes,
                seconds: seconds.median,
                durable_seconds: durable,
                gib_per_s: gib_per_s(bytes, seconds.median),
                rounds: arrivals.iter().map(|a| a.settled_seconds).collect(),
            },
        );
        let rate = |seconds| gib_per_s(bytes, seconds);
        rows.push(vec![
            words_of(*kind),
            format!("{:.2}", rate(seconds.median)),
            format!("{:.2}-{:.2}", rate(seconds.max), rate(seconds.min)),
            units::bytes(wire_bytes),
            format!("{durable:.2} s"),
        ]);
    }
    output.table(1, &rows);
    let sentences = sentences(bytes, link, kinds);
    output.human(&format!(
        "connecting takes {:.2} ms, a call {:.2} ms, a push of {} {:.2} ms",
        link.connect_seconds * 1e3,
        link.call_seconds * 1e3,
        units::bytes(SMALL_BYTES),
        link.small_push_seconds * 1e3
    ));
    if !output.is_json() {
        sentences.iter().for_each(|sentence| output.line(sentence));
    }
    let (machine, date) = (Machine::here(), machine::date());
    output.event(
        "summary",
        &SummaryEvent {
            version: env!("CARGO_PKG_VERSION"),
            date: &date,
            server: authority,
            machine: &machine,
            bytes,
            rounds,
            sentences: &sentences,
        },
    );
    output.human(&format!(
        "{} at a time, medians of {}; from {}; {date}",
        units::bytes(bytes),
        units::count(rounds.into(), "round"),
        machine.words()
    ));
}

/// How fast, and what holds it.
fn sentences(bytes: u64, link: &LinkEvent, kinds: &[(Kind, Vec<Arrival>)]) -> Vec<String> {
    let rate = |arrivals: &[Arrival]| bytes as f64 / settled(arrivals).median.max(1e-9);
    let rates = |data: Data| {
        let like = kinds.iter().filter(move |(kind, _)| kind.data == data);
        like.map(|(kind, arrivals)| (kind.lanes, rate(arrivals), arrivals))
    };
    let Some((lanes, dense, arrivals)) = rates(Data::Noise).max_by(|a, b| a.1.total_cmp(&b.1))
    else {
        return Vec::new();
    };
    let one_lane = rates(Data::Noise).next().map_or(dense, |(_, rate, _)| rate);
    let sparse = rates(Data::Sparse)
        .map(|(_, rate, _)| rate)
        .fold(0.0, f64::max);
    let durable = Spread::of(arrivals.iter().map(|a| a.durable_seconds)).median;
    // The last group of a push that stays open waits half a second for more.
    let lag = durable - settled(arrivals).median - 0.5;
    let limit = if lag > settled(arrivals).median / 2.0 {
        "the server's disk: bytes arrive faster than they become durable"
    } else if sparse > dense * CLEARLY {
        "the way there: fewer bytes on the wire arrive faster"
    } else if one_lane * link.connect_seconds > WINDOW_BYTES / 2.0 {
        "the window of a connection: use more lanes"
    } else if dense > one_lane * CLEARLY {
        "what one connection does: more lanes are faster"
    } else {
        "one of the two machines: neither fewer bytes on the wire nor more lanes are faster"
    };
    vec![format!(
        "dense values arrived at {:.2} GiB/s over {}; limit: {limit}",
        dense / (1u64 << 30) as f64,
        units::count(lanes.into(), "lane"),
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 1 << 30;

    fn limit_of(noise: [f64; 3], sparse: f64, durable: f64, rtt: f64) -> String {
        let arrival = |seconds: f64| Arrival {
            settled_seconds: seconds,
            durable_seconds: seconds + durable,
            wire_bytes: BYTES,
            durability: Durability::Disk,
        };
        let kind = |data, lanes, seconds| (Kind { data, lanes }, vec![arrival(seconds)]);
        let mut kinds: Vec<_> = (0..3)
            .map(|i| kind(Data::Noise, LANES[i], noise[i]))
            .collect();
        kinds.push(kind(Data::Sparse, 2, sparse));
        let link = LinkEvent {
            connect_seconds: rtt,
            call_seconds: rtt * 2.0,
            small_push_seconds: rtt * 5.0,
        };
        sentences(BYTES, &link, &kinds).join("")
    }

    #[test]
    fn what_changes_the_rate_is_the_limit() {
        for (noise, sparse, durable, rtt, words) in [
            ([1.0, 1.0, 1.0], 1.0, 0.3, 1e-4, "one of the two machines"),
            ([1.0, 1.0, 1.0], 1.0, 3.0, 1e-4, "the server's disk"),
            ([9.0, 9.0, 9.0], 4.0, 0.3, 0.1, "the way there"),
            ([3.0, 1.5, 1.0], 1.5, 0.3, 0.1, "the window"),
            ([3.0, 1.5, 1.0], 1.5, 0.3, 1e-4, "what one connection does"),
        ] {
            let found = limit_of(noise, sparse, durable, rtt);
            assert!(found.contains(words), "{found}, not {words}");
        }
    }
}
