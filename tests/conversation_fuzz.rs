//! Seeded conversations over the real stack: what a sender may say, out of order,
//! damaged, twice, cut off, slowly, and by lanes that nobody asked for. After each the
//! server is as it was, and what an honest sender left can always be completed.
//!
//! `TENSORFERRY_CONVERSATIONS` sets how many (200), `TENSORFERRY_SEED` the first seed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a helper of a test may panic, and says which seed it ran"
)]

mod common;

use common::{
    raw::{RawCall, connect, message},
    torn::Relay,
    *,
};
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};
use tensorferry::wire::pb::{self, receiver_frame::Control};
use tokio::time::timeout;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Names that conversations are about.
const NAMES: [&str; 4] = ["fuzz.0", "fuzz.1", "nested/fuzz.2", "fuzz.3"];
/// Conversations about each name between two completions of it.
const ROUND: usize = 10;
/// What an answer may take before the conversation goes on without it.
const PATIENCE: Duration = Duration::from_millis(30);

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().expect("a number"))
}

/// What an honest sender of this name would send.
fn load_of(name: &str) -> Load {
    let parts = vec![
        tensor(&format!("{name}/a"), 3 * CHUNK + 77),
        floats("zeros", vec![0; CHUNK + 400]),
        tensor("empty", 0),
        blob("config.json", b"{}"),
    ];
    let sources = vec![source(1, 1, true)];
    Load::from_sources(sources, parts)
}

/// One conversation.
struct Talk<'a> {
    rng: Rng,
    name: &'static str,
    load: &'a Load,
    channel: Channel,
    call: RawCall,
    relay: Relay,
    /// Bytes of messages that were sent, to be sent again.
    said: Vec<Vec<u8>>,
    token: Vec<u8>,
    wanted: Vec<(u32, u64)>,
    /// Another owner than the honest sender has begun something under the name.
    foreign: bool,
}

impl Talk<'_> {
    fn say(&mut self, frame: &pb::SenderFrame) {
        let mut bytes = message(frame);
        if self.rng.chance(4) {
            self.spoil(&mut bytes);
        }
        if self.rng.chance(5) {
            // In pieces of any size.
            let at = self.rng.below(bytes.len());
            self.call.send(bytes[..at].to_vec());
            self.call.send(bytes[at..].to_vec());
        } else {
            self.call.send(bytes.clone());
        }
        if self.said.len() < 16 {
            self.said.push(bytes);
        }
    }

    /// Damages the bytes of a message.
    fn spoil(&mut self, bytes: &mut Vec<u8>) {
        let at = self.rng.below(bytes.len());
        match self.rng.below(5) {
            0 => bytes[at] ^= 1 << self.rng.below(8),
            1 => bytes.truncate(at),
            2 => bytes[0] = self.rng.next() as u8,
            3 => bytes[1..5].copy_from_slice(&(self.rng.next() as u32).to_be_bytes()),
            _ => bytes.insert(at, self.rng.next() as u8),
        }
    }

    /// Takes in what is answered until something was heard, or patience ends.
    async fn hear(&mut self, heard: impl Fn(&pb::ReceiverFrame) -> bool) {
        while let Ok(Ok(frame)) = timeout(PATIENCE, self.call.next()).await {
            if let Some(Control::Accept(accept)) = &frame.control {
                self.token = accept.session_token.to_vec();
            }
            for wanted in &frame.wanted {
                for run in &wanted.wanted {
                    let cells = run.first..run.first + run.count;
                    self.wanted.extend(cells.map(|cell| (wanted.entry, cell)));
                }
            }
            if heard(&frame) {
                return;
            }
        }
    }

    fn open(&mut self, mutate: bool) -> pb::SenderFrame {
        let mut open = self.load.open(self.name, [7; 16]);
        open.overwrite = self.rng.chance(80);
        if mutate {
            match self.rng.below(10) {
                0 => open.protocol_version = self.rng.next() as u32,
                1 => open.checkpoint = "../../etc".to_owned(),
                2 => {
                    open.transfer_id = vec![9; 16].into();
                    self.foreign = true;
                }
                3 => open.transfer_id = vec![9; 3].into(),
                4 => open.codecs = self.rng.next() as u32,
                5 => open.total_bytes = self.rng.next(),
                6 => {
                    open.manifest_complete = false;
                    self.foreign = true;
                }
                7 => {
                    open.restart = true;
                    open.verify = true;
                }
                8 => open.chunk_len = self.rng.next() as u32,
                _ => open.entry_count = self.rng.next(),
            }
        }
        frame_open(open)
    }

    fn announcement(&mut self, mutate: bool) -> pb::SenderFrame {
        let mut frame = self.load.announcement();
        if mutate {
            let at = self.rng.below(frame.entries.len());
            match self.rng.below(7) {
                0 => frame.entries.swap(0, at),
                1 => frame.entries.push(frame.entries[at].clone()),
                2 => frame.entries[at].byte_len = self.rng.next(),
                3 => frame.entries[at].shape.push(self.rng.next()),
                4 => frame.entries[at].index = self.rng.next() as u32,
                5 => frame.sources.clear(),
                _ => frame.entries[at].dtype = "float4096".to_owned(),
            }
        }
        frame
    }

    fn chunk(&mut self, mutate: bool) -> pb::SenderFrame {
        let (entry, cell) = match self.wanted.pop() {
            Some(wanted) => wanted,
            None => (0, self.rng.below(4) as u64),
        };
        let mut frame = self.load.chunk(entry, cell);
        if entry == 1 && self.rng.chance(50) {
            frame.chunks[0].codec = 1;
            frame.chunks[0].encoded_len = 0;
            frame.payload.clear();
        }
        if mutate {
            let head = &mut frame.chunks[0];
            match self.rng.below(9) {
                0 => head.crc32c ^= 1,
                1 => head.offset = self.rng.next(),
                2 => head.raw_len = self.rng.next() as u32,
                3 => head.encoded_len = self.rng.next() as u32,
                4 => head.codec = self.rng.below(6) as u32,
                5 => head.entry = self.rng.next() as u32,
                6 => frame.payload = vec![0xf0; frame.payload.len()].into(),
                7 => frame.chunks.push(frame.chunks[0]),
                _ => frame.chunks.clear(),
            }
        }
        frame
    }

    fn finish(&mut self, mutate: bool) -> pb::SenderFrame {
        let mut finish = self.load.finish();
        if mutate {
            match self.rng.below(3) {
                0 => finish.entry_count = self.rng.next(),
                1 => finish.total_bytes = self.rng.next(),
                _ => finish.entries_digest = vec![1; 16].into(),
            }
        }
        frame_finish(finish)
    }

    /// Something that has no place here.
    async fn nonsense(&mut self) {
        match self.rng.below(10) {
            0 => self.say(&pb::SenderFrame::default()),
            1 => {
                let open = self.open(false);
                self.say(&open);
            }
            2 => {
                let compare = pb::Compare {
                    entry: self.rng.below(6) as u32,
                    first_cell: self.rng.next() % 8,
                    blake3: vec![3; 32 * self.rng.below(5) + self.rng.below(2)].into(),
                };
                self.say(&frame_compare(compare));
            }
            3 => self.say(&frame_join(&[1; 16], 1)),
            4 => {
                // A lane of a session of nobody, or of this one.
                let token = if self.rng.chance(50) {
                    self.token.clone()
                } else {
                    vec![5; 16]
                };
                let lane = self.rng.below(3) as u32;
                let mut lane_call = RawCall::begin(&mut self.channel, None).await;
                lane_call.send(message(&frame_join(&token, lane)));
                if self.rng.chance(50) {
                    let chunk = self.chunk(false);
                    lane_call.send(message(&chunk));
                }
                let _ = timeout(PATIENCE, lane_call.next()).await;
            }
            5 => {
                if let Some(bytes) = self.said.last().cloned() {
                    self.call.send(bytes);
                }
            }
            6 => {
                let len = 1 + self.rng.below(200);
                let garbage: Vec<u8> = (0..len).map(|_| self.rng.next() as u8).collect();
                self.call.send(garbage);
            }
            7 => tokio::time::sleep(Duration::from_millis(self.rng.next() % 20)).await,
            8 => self.late_head(),
            _ => {
                let finish = self.finish(false);
                self.say(&finish);
            }
        }
    }

    /// A chunk whose head comes after its payload: legal, if unusual.
    fn late_head(&mut self) {
        use prost::Message as _;
        let frame = self.chunk(false);
        let payload = pb::SenderFrame {
            payload: frame.payload.clone(),
            ..Default::default()
        };
        let head = pb::SenderFrame {
            payload: Vec::new().into(),
            ..frame
        };
        let body = [payload.encode_to_vec(), head.encode_to_vec()].concat();
        let len = (body.len() as u32).to_be_bytes();
        self.call.send([&[0], &len[..], &body].concat());
    }

    /// The grammar: open, announce, chunks, finish; with a slip now and then.
    async fn run(&mut self) {
        let slip = [0, 5, 15, 40][self.rng.below(4)];
        let mut frames_left = 4 + self.rng.below(14);
        if !self.rng.chance(slip) {
            let mutate = self.rng.chance(slip);
            let open = self.open(mutate);
            self.say(&open);
            self.hear(|f| matches!(f.control, Some(Control::Accept(_))))
                .await;
        }
        if !self.rng.chance(slip) {
            let mutate = self.rng.chance(slip);
            let announcement = self.announcement(mutate);
            self.say(&announcement);
            self.hear(|f| f.wanted.iter().any(|w| w.last && w.entry == 3))
                .await;
        }
        while frames_left > 0 {
            frames_left -= 1;
            if self.rng.chance(slip) {
                self.nonsense().await;
            } else if self.wanted.is_empty() && self.rng.chance(50) {
                self.hear(|f| f.ack.is_some()).await;
                break;
            } else {
                let mutate = self.rng.chance(slip / 2);
                let chunk = self.chunk(mutate);
                self.say(&chunk);
            }
        }
        self.leave().await;
    }

    /// One of the ways in which a conversation ends.
    async fn leave(&mut self) {
        match self.rng.below(6) {
            0 | 1 => {
                let mutate = self.rng.chance(20);
                let finish = self.finish(mutate);
                self.say(&finish);
                // Publishing waits for the disk.
                for _ in 0..10 {
                    self.hear(|_| false).await;
                }
            }
            2 => {
                self.call.close();
                self.hear(|_| false).await;
            }
            3 => {
                self.say(&frame_abort("INTERRUPTED"));
                self.hear(|_| false).await;
            }
            4 => self.relay.cut(),
            // The stream is reset where it is, often inside a message.
            _ => {
                let chunk = message(&self.chunk(false));
                let at = self.rng.below(chunk.len());
                self.call.send(chunk[..at].to_vec());
            }
        }
    }
}

/// What the server is checked against after every conversation.
struct Watch {
    server: TestServer,
    health: HealthClient<Channel>,
    published: BTreeMap<PathBuf, u64>,
    load: Load,
    descriptor_count: usize,
}

impl Watch {
    async fn start(root: &std::path::Path) -> Watch {
        let server = TestServer::start(root).await;
        let load = load_of("published");
        server.push(load.open("published", [1; 16]), &load).await;
        let health = HealthClient::new(connect(server.address).await);
        // Threads and folders that are made once are made before anything is counted.
        server.serves_others().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Watch {
            published: tree(&root.join("published")),
            load,
            health,
            descriptor_count: descriptor_count(),
            server,
        }
    }

    async fn check(&mut self) {
        let request = HealthCheckRequest {
            service: "tensorferry.v1.Ferry".to_owned(),
        };
        let answer = timeout(HANG, self.health.check(request)).await;
        assert_eq!(
            answer.expect("health answers").unwrap().into_inner().status,
            1
        );
        let settled = async {
            while self.is_busy().await || descriptor_count() > self.descriptor_count {
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        };
        let is_settled = timeout(Duration::from_secs(10), settled).await.is_ok();
        assert!(
            is_settled,
            "descriptors before {}, now {}; live: {}",
            self.descriptor_count,
            descriptor_count(),
            self.is_busy().await
        );
        let published = self.server.root.join("published");
        assert_eq!(tree(&published), self.published);
    }

    async fn is_busy(&self) -> bool {
        let client = self.server.client();
        let rows = client.list("").await.unwrap();
        rows.iter().any(|row| row.active)
    }

    /// An honest sender completes what is there, and it is all right.
    async fn complete(&self, name: &str, load: &Load, foreign: bool) {
        let mut open = load.open(name, [7; 16]);
        open.overwrite = true;
        open.restart = foreign;
        let mut session = self.server.open(open).await;
        session.announce(load).await;
        for (entry, cells) in session.held.clone() {
            for cell in cells {
                session
                    .send(frame_compare(load.compare(entry, cell, 1)))
                    .await;
                session
                    .until(|s| {
                        let has =
                            |c: &session::Cells| c.get(&entry).is_some_and(|c| c.contains(&cell));
                        has(&s.kept) || has(&s.wanted)
                    })
                    .await;
            }
        }
        session.send_wanted(load).await;
        session.finish(load).await;
        self.server.assert_landed(name, load);
        std::fs::remove_dir_all(self.server.root.join(name)).unwrap();
        self.server.assert_landed("published", &self.load);
    }
}

fn descriptor_count() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_said_the_server_stays_as_it_was() {
    let count = setting("TENSORFERRY_CONVERSATIONS", 200);
    let first_seed = setting("TENSORFERRY_SEED", 1);
    let temp = tempfile::tempdir().unwrap();
    let mut watch = Watch::start(temp.path()).await;
    let loads = NAMES.map(load_of);
    let mut foreign = [false; NAMES.len()];
    let mut endings: BTreeMap<String, u64> = BTreeMap::new();
    let seeds: Vec<u64> = (first_seed..first_seed + count).collect();
    for (round, batch) in seeds.chunks(NAMES.len()).enumerate() {
        // One about each name, side by side.
        println!(
            "TENSORFERRY_SEED={} TENSORFERRY_CONVERSATIONS={}",
            batch[0],
            batch.len()
        );
        let talks = batch.iter().zip(NAMES).zip(&loads);
        let talks: Vec<_> = talks
            .map(|((&seed, name), load)| {
                let (address, load) = (watch.server.address, load.clone());
                tokio::spawn(async move { converse(seed, name, &load, address).await })
            })
            .collect();
        for (at, talk) in talks.into_iter().enumerate() {
            let (ending, is_foreign) = timeout(HANG, talk).await.expect("it ends").unwrap();
            foreign[at] |= is_foreign;
            *endings.entry(ending).or_default() += 1;
        }
        watch.check().await;
        if round % ROUND == ROUND - 1 || (round + 1) * NAMES.len() >= seeds.len() {
            for (at, name) in NAMES.iter().enumerate() {
                watch.complete(name, &loads[at], foreign[at]).await;
                foreign[at] = false;
            }
            watch.check().await;
        }
    }
    println!("{endings:?}");
    // The grammar reaches what it is meant to reach.
    if count >= 200 {
        for ending in ["Ok", "left", "BAD_FRAME", "BAD_RANGE", "INTERRUPTED"] {
            assert!(endings.contains_key(ending), "{ending} in {endings:?}");
        }
    }
    assert!(!endings.contains_key("BUG"), "{endings:?}");
}

/// Holds one conversation. Returns how it ended, and whether it began something of
/// another owner.
async fn converse(
    seed: u64,
    name: &'static str,
    load: &Load,
    server: SocketAddr,
) -> (String, bool) {
    let mut rng = Rng(seed);
    let max_bytes = match rng.chance(15) {
        true => 200 + rng.below(900_000),
        false => usize::MAX,
    };
    let relay = Relay::start(server, max_bytes).await;
    let mut channel = connect(relay.address).await;
    let call = RawCall::begin(&mut channel, None).await;
    let mut talk = Talk {
        rng,
        name,
        load,
        channel,
        call,
        relay,
        said: Vec::new(),
        token: Vec::new(),
        wanted: Vec::new(),
        foreign: false,
    };
    talk.run().await;
    let ending = match timeout(Duration::from_millis(1), talk.call.next()).await {
        Ok(Err(status)) => ending_of(&status),
        Ok(Ok(_)) | Err(_) => "left".to_owned(),
    };
    (ending, talk.foreign)
}

fn ending_of(status: &tonic::Status) -> String {
    use tonic_types::StatusExt;
    match status.get_details_error_info() {
        Some(info) => info.reason,
        None if status.code() == Code::Ok => "Ok".to_owned(),
        None => "cut".to_owned(),
    }
}
