use super::*;
use crate::format::Dtype;
use crate::format::safetensors::{TensorSpec, encode_header, name_of};
use proptest::prelude::*;

fn parse(json: &str, data_len: u64) -> Result<Header, HeaderError> {
    parse_header(json.as_bytes(), data_len)
}

fn malformed(json: &str, data_len: u64, text: &str) {
    match parse(json, data_len) {
        Err(HeaderError::Malformed(why)) => assert!(why.contains(text), "{json}: {why}"),
        other => panic!("{json}: {other:?}"),
    }
}

#[test]
fn tensors_come_in_the_order_of_their_data() {
    let json = r#"  {"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},
        "__metadata__":{"format":"pt","n":3,"deep":{"x":[{}]},"none":null},
        "s":{"dtype":"BF16","shape":[],"data_offsets":[9,11],"more":[1]},
        "e":{"dtype":"I64","shape":[0,7],"data_offsets":[1,1]},
        "a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   "#;
    let header = parse(json, 11).unwrap();
    let names: Vec<&str> = header
        .tensors
        .iter()
        .map(|t| t.header.name.as_str())
        .collect();
    assert_eq!(names, ["a", "e", "b", "s"]);
    assert_eq!(header.tensors[3].header.dtype(), Some(Dtype::Bf16));
    assert_eq!(
        header.metadata,
        BTreeMap::from([("format".into(), "pt".into())])
    );
    assert_eq!(parse("{}", 0).unwrap(), Header::default());
    assert!(parse(r#"{"__metadata__":[1,"x"]}"#, 0).is_ok());
}

#[test]
fn holes_overlaps_and_wrong_lengths_are_refused() {
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    assert!(parse(&two("[0,4]", "[4,8]"), 8).is_ok());
    malformed(&two("[0,4]", "[5,9]"), 9, "a hole");
    malformed(&two("[1,5]", "[5,9]"), 9, "a hole");
    malformed(&two("[0,4]", "[3,7]"), 7, "an overlap");
    malformed(&two("[0,4]", "[0,4]"), 4, "an overlap");
    malformed(
        &two("[0,4]", "[4,8]"),
        9,
        "the tensors end at 8, the data have 9",
    );
    malformed(&two("[0,4]", "[4,8]"), 7, "end at 8");
    malformed(&two("[0,5]", "[5,9]"), 9, "4 bytes by shape");
    malformed(&two("[0,4]", "[4,3]"), 8, "from 4 to 3");
    malformed(&two("[0,4]", "[4]"), 8, "bad json");
    malformed(&two("[0,4]", "[4,8,9]"), 8, "bad json");
    malformed(&two("[0,4]", "[4,18446744073709551616]"), 8, "bad json");
    malformed(
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} x"#,
        1,
        "bad json",
    );
    malformed("[]", 0, "bad json");
    malformed("", 0, "bad json");
}

#[test]
fn sizes_that_overflow_and_bits_that_do_not_fill_bytes() {
    let one = |dtype: &str, shape: &str, len: u64| {
        let json =
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{len}]}}}}"#);
        parse(&json, len)
    };
    assert!(matches!(
        one("F32", "[4294967296,4294967296]", 0),
        Err(HeaderError::Plan(PlanError::Shape { .. }))
    ));
    assert!(matches!(
        one("F4", "[3]", 2),
        Err(HeaderError::Plan(PlanError::Shape { .. }))
    ));
    let packed = one("F4", "[3,2]", 3).unwrap();
    assert_eq!(packed.tensors[0].header.shape, [3, 2]);
    assert!(one("F6_E2M3", "[4]", 3).is_ok());
    assert!(matches!(
        one("F128", "[1]", 16),
        Err(HeaderError::Unsupported { .. })
    ));
    assert!(one("U8", &format!("{:?}", [1; 32]), 1).is_ok());
    assert!(one("U8", &format!("{:?}", [1; 33]), 1).is_err());
}

#[test]
fn names_that_occur_twice_are_found() {
    let one = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let twice = PlanError::Duplicate { name: "a".into() };
    assert_eq!(
        parse(&format!(r#"{{"a":{one},"a":{one}}}"#), 0),
        Err(twice.into())
    );
    malformed(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "twice");
}

#[test]
fn deep_nesting_does_not_overflow_the_stack() {
    for (open, close) in [("[", "]"), (r#"{"x":"#, "}")] {
        let bomb = format!("{}1{}", open.repeat(200_000), close.repeat(200_000));
        let _ = parse(&format!(r#"{{"__metadata__":{bomb}}}"#), 0);
        let _ = parse(&format!(r#"{{"a":{bomb}}}"#), 0);
        let _ = parse(&format!(r#"{{"__metadata__":{{"a":{bomb}}}}}"#), 0);
    }
}

#[test]
fn sniffing_asks_for_a_sane_length_and_a_brace() {
    let with = |len: u64, text: &str| [&len.to_le_bytes()[..], text.as_bytes()].concat();
    assert!(sniff(&with(2, "{}")));
    assert!(sniff(&with(100, " \n{")));
    assert!(sniff(&with(5000, &" ".repeat(4088))));
    assert!(!sniff(&with(100, "  ")));
    assert!(!sniff(&with(0, "{}")));
    assert!(!sniff(&with(MAX_HEADER_LEN + 1, "{}")));
    assert!(!sniff(b"{\"a\": 1, \"b\": 2}"));
    assert!(!sniff(b"\x02\0\0\0"));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(json in prop::collection::vec(any::<u8>(), 0..200), len: u64) {
        let _ = parse_header(&json, len);
        let _ = sniff(&json);
    }

    #[test]
    fn no_header_makes_it_panic(
        tensors in prop::collection::vec(
            ("[ab]{1,2}", "(U8|F32|F4|X)", prop::collection::vec(0u64..5, 0..3), 0u64..20, 0u64..20),
            0..4,
        ),
        len in 0u64..20,
    ) {
        let fields: Vec<String> = tensors
            .iter()
            .map(|(name, dtype, shape, start, end)| format!(
                r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
            ))
            .collect();
        if let Ok(header) = parse(&format!("{{{}}}", fields.join(",")), len) {
            let total: u64 = header.tensors.iter().map(|t| t.header.byte_len).sum();
            prop_assert_eq!(total, len);
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_reads_back_as_it_was(
        shapes in proptest::collection::vec(
            (0..Dtype::ALL.len(), proptest::collection::vec(0u64..9, 0..4)), 0..20),
        metadata in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..3),
    ) {
        let named: Vec<_> = shapes.iter().enumerate()
            .map(|(i, (dtype, shape))| (format!("tensor {}", i * 7919 % 20), Dtype::ALL[*dtype], shape))
            .filter(|(_, dtype, shape)| name_of(*dtype).is_some() && dtype.byte_len(shape).is_some())
            .collect();
        let specs: Vec<_> = named.iter()
            .map(|(name, dtype, shape)| TensorSpec { name, dtype: *dtype, shape })
            .collect();
        let file = encode_header(&specs, &metadata).unwrap();
        let data_start = file.header.len() as u64;
        prop_assert_eq!(data_start % 8, 0);
        let read = parse_header(&file.header[8..], file.file_len - data_start).unwrap();
        prop_assert_eq!(&read.metadata, &metadata);
        prop_assert_eq!(read.tensors.len(), specs.len());
        let mut at = data_start;
        for &index in &file.order {
            let found = read.tensors.iter().find(|t| t.header.name == specs[index].name).unwrap();
            prop_assert_eq!(found.header.dtype(), Some(specs[index].dtype));
            prop_assert_eq!(&found.header.shape, specs[index].shape);
            prop_assert_eq!(file.offsets[index], at);
            prop_assert_eq!(data_start + found.data_offset, at);
            prop_assert_eq!(at % specs[index].dtype.bits().div_ceil(8), 0);
            at += found.header.byte_len;
        }
        prop_assert_eq!(file.file_len, at);
    }
}
