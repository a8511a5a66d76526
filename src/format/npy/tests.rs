use super::*;
use proptest::prelude::*;

fn with_dict(version: u8, dict: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&[version, 0]);
    match version {
        1 => bytes.extend_from_slice(&(dict.len() as u16).to_le_bytes()),
        _ => bytes.extend_from_slice(&(dict.len() as u32).to_le_bytes()),
    }
    bytes.extend_from_slice(dict);
    bytes
}

fn expected(dict: &str, total_len: usize) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&((total_len - 10) as u16).to_le_bytes());
    bytes.extend_from_slice(dict.as_bytes());
    bytes.resize(total_len - 1, b' ');
    bytes.push(b'\n');
    bytes
}

#[test]
fn headers_are_those_of_numpy() {
    for (descr, fortran, shape, dict) in [
        (
            "<f8",
            false,
            &[][..],
            "{'descr': '<f8', 'fortran_order': False, 'shape': (), }",
        ),
        (
            "|u1",
            false,
            &[0],
            "{'descr': '|u1', 'fortran_order': False, 'shape': (0,), }",
        ),
        (
            "<f4",
            false,
            &[3],
            "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        ),
        (
            "<f4",
            false,
            &[2, 3],
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
        ),
        (
            "<f4",
            true,
            &[2, 3],
            "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
        ),
    ] {
        assert_eq!(
            encode_header(descr, fortran, shape),
            expected(dict, 128),
            "{dict}"
        );
    }
    let many = vec!["1"; 32].join(", ");
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({many}), }}");
    assert_eq!(encode_header("<f4", false, &[1; 32]), expected(&dict, 192));
}

/// 53 characters of dict, 20 of growth, newline and prefix: 64 + 20 unpadded, so
/// a growing axis of other width must not move the data.
#[test]
fn growth_room_belongs_to_the_slowest_axis() {
    for shape in [&[1u64, 7][..], &[u64::MAX, 7], &[10, 7]] {
        assert_eq!(encode_header("<f4", false, shape).len(), 128);
        let mut turned = shape.to_vec();
        turned.reverse();
        assert_eq!(encode_header("<f4", true, &turned).len(), 128);
    }
    // A remainder of zero is padded with a full 64: dict 96, growth 20, 12 more.
    let header = (0..64)
        .map(|n| encode_header(&format!("<f{}", "4".repeat(n + 1)), false, &[3]))
        .find(|h| h.iter().rev().skip(1).take_while(|&&b| b == b' ').count() == 64 + 20);
    assert!(header.is_some_and(|h| h.len().is_multiple_of(64)));
}

#[test]
fn a_dict_beyond_16_bits_makes_version_2() {
    let descr = "x".repeat(70_000);
    let header = encode_header(&descr, false, &[3]);
    assert_eq!(header[6], 2);
    assert!(header.len().is_multiple_of(64));
    assert_eq!(parse_header(&header).unwrap().descr, descr);
}

#[test]
fn other_writers_are_understood() {
    for dict in [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\n",
        "{'shape': (2L, 3L), 'fortran_order': False, 'descr': '<f4'}",
        "{\"descr\":\"<f4\",\"fortran_order\":False,\"shape\":(2,3,)}",
        "  {u'descr' : b'<f4' , 'fortran_order' :\tFalse , 'shape' : ( 2 , 3 ) , }  \n",
    ] {
        for version in 1..=3 {
            let bytes = with_dict(version, dict.as_bytes());
            let header = parse_header(&bytes).unwrap();
            assert_eq!(
                (header.descr.as_str(), header.fortran_order),
                ("<f4", false)
            );
            assert_eq!(header.shape, [2, 3]);
            assert_eq!(header.data_offset, bytes.len() as u64);
        }
    }
}

#[test]
fn broken_dicts_are_refused() {
    for dict in [
        "",
        "{",
        "{}",
        "[]",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [3]}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616,)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': ()}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), 'x': ()}",
        "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ()} x",
        "{'descr': '<f4, 'fortran_order': False, 'shape': ()}",
        "{'descr': '\\x41', 'fortran_order': False, 'shape': ()}",
    ] {
        let error = parse_header(&with_dict(1, dict.as_bytes())).unwrap_err();
        assert!(matches!(error, NpyError::Syntax { .. }), "{dict}: {error}");
    }
    let deep = format!("{{'shape': ({}), }}", "1, ".repeat(65));
    assert!(parse_header(&with_dict(1, deep.as_bytes())).is_err());
}

#[test]
fn objects_and_records_are_named() {
    let object = encode_header("|O", false, &[1]);
    assert_eq!(
        parse_header(&object),
        Err(NpyError::Object { descr: "|O".into() })
    );
    let fields = b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': ()}";
    assert_eq!(
        parse_header(&with_dict(1, fields)),
        Err(NpyError::Structured)
    );
}

#[test]
fn the_length_is_known_from_few_bytes_and_capped() {
    assert_eq!(header_len(b"PK\x03\x04"), Err(NpyError::NotNpy));
    assert_eq!(
        header_len(b""),
        Err(NpyError::Short {
            needed: 8,
            found: 0
        })
    );
    assert_eq!(header_len(b"\x93NUMPY\x01\x00\x76\x00"), Ok(128));
    let short = NpyError::Short {
        needed: 12,
        found: 10,
    };
    assert_eq!(header_len(b"\x93NUMPY\x02\x00\x76\x00"), Err(short));
    let huge = NpyError::TooLong {
        found: u64::from(u32::MAX),
        limit: 1 << 20,
    };
    assert_eq!(header_len(b"\x93NUMPY\x03\x00\xff\xff\xff\xff"), Err(huge));
    let version = NpyError::Version { major: 4, minor: 0 };
    assert_eq!(header_len(b"\x93NUMPY\x04\x00\x76\x00"), Err(version));
    let cut = &encode_header("<f4", false, &[3])[..100];
    assert_eq!(
        parse_header(cut),
        Err(NpyError::Short {
            needed: 128,
            found: 100
        })
    );
}

#[test]
fn element_types_of_numpy_and_ml_dtypes() {
    for (descr, dtype, big) in [
        ("<f4", Dtype::F32, false),
        (">f4", Dtype::F32, true),
        ("=f4", Dtype::F32, cfg!(target_endian = "big")),
        ("|b1", Dtype::Bool, false),
        (">u1", Dtype::U8, false),
        (">c16", Dtype::C128, true),
        ("<V2", Dtype::Bf16, false),
        ("|V2", Dtype::Bf16, false),
        ("|V1", Dtype::V1, false),
        ("<V1", Dtype::V1, false),
        ("|V4", Dtype::V4, false),
        ("<f1", Dtype::F8E5m2, false),
        ("<W4", Dtype::C32, false),
        ("bfloat16", Dtype::Bf16, false),
        ("float8_e5m2", Dtype::F8E5m2, false),
        ("int4", Dtype::I4, false),
        ("float4_e2m1fn", Dtype::V1, false),
    ] {
        assert_eq!(dtype_of_descr(descr), Ok((dtype, big)), "{descr}");
    }
    for descr in [
        "<U8",
        "|S4",
        "<M8[ns]",
        "<m8[s]",
        ">V2",
        ">V4",
        "<V3",
        "<f16",
        "<bfloat16",
        "",
        "<",
        "ä",
    ] {
        let named = NpyError::Descr {
            descr: descr.to_owned(),
        };
        assert_eq!(dtype_of_descr(descr), Err(named));
    }
    assert!(matches!(dtype_of_descr("|O"), Err(NpyError::Object { .. })));
}

#[test]
fn every_description_written_is_read_again() {
    for &dtype in Dtype::ALL {
        for big in [false, dtype.can_be_big_endian()] {
            let (found, found_big) = dtype_of_descr(&dtype.npy_descr(big)).unwrap();
            assert_eq!(found.npy_descr(found_big), dtype.npy_descr(big));
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        descr in "[ -~]{0,300}",
        fortran_order: bool,
        shape in prop::collection::vec(any::<u64>(), 0..=32),
    ) {
        prop_assume!(!descr.trim_start_matches(['<', '>', '|', '=']).starts_with('O'));
        let bytes = encode_header(&descr, fortran_order, &shape);
        prop_assert_eq!(bytes.len() % 64, 0);
        prop_assert_eq!(header_len(&bytes[..12]), Ok(bytes.len()));
        let data_offset = bytes.len() as u64;
        let header = NpyHeader { descr, fortran_order, shape, data_offset };
        prop_assert_eq!(parse_header(&bytes), Ok(header));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = header_len(&bytes);
        let _ = parse_header(&bytes);
        let _ = parse_header(&with_dict(1, &bytes));
    }

    #[test]
    fn no_dict_makes_it_panic(dict in "[{}():,'\" descrfotanshpTuFl0-9L_<>|\\\\]{0,90}", version in 1u8..=3) {
        let _ = parse_header(&with_dict(version, dict.as_bytes()));
        let _ = dtype_of_descr(&dict);
    }
}
