use super::*;

fn entry() -> wire::Entry {
    wire::Entry {
        number: 3,
        name: "w".into(),
        kind: KIND_TENSOR,
        dtype: "float32".into(),
        shape: vec![2, 3],
        byte_len: 24,
        file: "w.npy".into(),
        source_keys: vec![copy(&[7; 16])],
        ..Default::default()
    }
}

#[test]
fn every_field_of_an_entry_comes_back() {
    for (fortran_order, big_endian) in [(false, false), (true, true)] {
        let body = wire::Entry {
            fortran_order,
            big_endian,
            ..entry()
        }
        .encode_to_vec();
        let record = decode(ENTRY, &body).unwrap().unwrap();
        assert_eq!(encode(&record), Ok((ENTRY, vec![body])));
    }
}

#[test]
fn entries_that_break_a_rule_are_refused() {
    let bad = [
        wire::Entry { kind: 0, ..entry() },
        wire::Entry {
            kind: KIND_BLOB,
            ..entry()
        },
        wire::Entry {
            dtype: "object".into(),
            ..entry()
        },
        wire::Entry {
            byte_len: 23,
            ..entry()
        },
        wire::Entry {
            name: String::new(),
            ..entry()
        },
        wire::Entry {
            file: "../w.npy".into(),
            ..entry()
        },
        wire::Entry {
            source_keys: vec![copy(&[7; 15])],
            ..entry()
        },
        wire::Entry {
            source_keys: vec![copy(&[7; 16]); 1025],
            ..entry()
        },
    ];
    for body in bad {
        assert!(decode(ENTRY, &body.encode_to_vec()).is_err(), "{body:?}");
    }
}

#[test]
fn fields_of_fixed_length_have_that_length() {
    let session = wire::Session {
        epoch: 1,
        nonce: copy(&[1; 16]),
        transfer_id: copy(&[2; 16]),
        ..Default::default()
    };
    assert!(decode(SESSION, &session.encode_to_vec()).is_ok());
    for bad in [
        wire::Session {
            nonce: Bytes::new(),
            ..session.clone()
        },
        wire::Session {
            transfer_id: copy(&[2; 17]),
            ..session.clone()
        },
        wire::Session {
            entries_digest: copy(&[2; 1]),
            ..session
        },
    ] {
        assert!(decode(SESSION, &bad.encode_to_vec()).is_err());
    }
    assert!(decode(SOURCE, b"").is_err());
    assert!(decode(PUBLISH, b"").is_err());
    assert_eq!(decode(8, b""), Ok(None));
}

#[test]
fn a_run_that_overflows_is_refused_both_ways() {
    let run = Run {
        entry: 0,
        first: u64::MAX,
        crcs: vec![1],
    };
    assert!(encode(&Record::Cells(vec![run])).is_err());
    let run = wire::Run {
        entry: 0,
        first: u64::MAX,
        crc32c: vec![1],
    };
    assert!(decode(CELLS, &wire::Cells { runs: vec![run] }.encode_to_vec()).is_err());
}

#[test]
fn large_records_are_cut_and_lose_nothing() {
    let runs: Vec<Run> = (0..3)
        .map(|i| Run {
            entry: u32::MAX - i,
            first: 1 << 60,
            crcs: (0..300_000).collect(),
        })
        .chain((0..60_000).map(|i| Run {
            entry: i,
            first: u64::from(i),
            crcs: vec![i],
        }))
        .collect();
    let (kind, bodies) = encode(&Record::Kept(runs.clone())).unwrap();
    assert!(bodies.len() > 4 && bodies.iter().all(|b| b.len() <= MAX_BODY_LEN));
    let mut cells = Vec::new();
    for body in &bodies {
        let Some(Record::Kept(part)) = decode(kind, body).unwrap() else {
            panic!()
        };
        cells.extend(part.iter().flat_map(|r| {
            (r.first..)
                .zip(&r.crcs)
                .map(|(c, &crc)| (r.entry, c, crc))
                .collect::<Vec<_>>()
        }));
    }
    let all = runs
        .iter()
        .flat_map(|r| (r.first..).zip(&r.crcs).map(|(c, &crc)| (r.entry, c, crc)));
    assert!(all.eq(cells));

    let numbers: Vec<u32> = (0..500_000).map(|i| u32::MAX - i).collect();
    let (kind, bodies) = encode(&Record::Forget(numbers.clone())).unwrap();
    assert!(bodies.len() > 1 && bodies.iter().all(|b| b.len() <= MAX_BODY_LEN));
    let parts = bodies.iter().map(|b| match decode(kind, b).unwrap() {
        Some(Record::Forget(part)) => part,
        other => panic!("{other:?}"),
    });
    assert_eq!(parts.collect::<Vec<_>>().concat(), numbers);
    assert_eq!(encode(&Record::Forget(vec![])).unwrap().1.len(), 0);
    assert_eq!(encode(&Record::Cells(vec![])).unwrap().1.len(), 0);
}
