//! Element types and what `.npy` calls them.
//!
//! The logical name is the one numpy or ml_dtypes uses, so that Python can say
//! `np.dtype(name)`. The `.npy` description of types that numpy itself does not
//! have is a plain void of the same width (`<V2`, `|V1`, `|V4`): the only
//! spelling that every numpy opens, also with `mmap_mode`.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal $descr:literal;)*) => {
        /// Type of the elements of a tensor.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[non_exhaustive]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every known type.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// Name as numpy or ml_dtypes spells it.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Width of one element in bits; 0 where elements come in blocks.
            pub fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits,)* }
            }

            /// Type code in a `.npy` header, without the byte order mark.
            fn code(self) -> &'static str {
                match self { $(Dtype::$variant => $descr,)* }
            }
        }
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool "bool" 8 "b1";
    /// Signed, 8 bits.
    I8 "int8" 8 "i1";
    /// Signed, 16 bits.
    I16 "int16" 16 "i2";
    /// Signed, 32 bits.
    I32 "int32" 32 "i4";
    /// Signed, 64 bits.
    I64 "int64" 64 "i8";
    /// Unsigned, 8 bits.
    U8 "uint8" 8 "u1";
    /// Unsigned, 16 bits.
    U16 "uint16" 16 "u2";
    /// Unsigned, 32 bits.
    U32 "uint32" 32 "u4";
    /// Unsigned, 64 bits.
    U64 "uint64" 64 "u8";
    /// IEEE half.
    F16 "float16" 16 "f2";
    /// IEEE single.
    F32 "float32" 32 "f4";
    /// IEEE double.
    F64 "float64" 64 "f8";
    /// Upper half of an IEEE single.
    Bf16 "bfloat16" 16 "V2";
    /// Two singles.
    C64 "complex64" 64 "c8";
    /// Two doubles.
    C128 "complex128" 128 "c16";
    /// Two halves.
    C32 "complex32" 32 "V4";
    /// 8-bit float, 4 exponent bits, finite.
    F8E4m3fn "float8_e4m3fn" 8 "V1";
    /// 8-bit float, 5 exponent bits.
    F8E5m2 "float8_e5m2" 8 "V1";
    /// 8-bit float, 4 exponent bits, finite, no negative zero.
    F8E4m3fnuz "float8_e4m3fnuz" 8 "V1";
    /// 8-bit float, 5 exponent bits, finite, no negative zero.
    F8E5m2fnuz "float8_e5m2fnuz" 8 "V1";
    /// 8-bit float, 4 exponent bits, bias 11.
    F8E4m3b11fnuz "float8_e4m3b11fnuz" 8 "V1";
    /// 8-bit float, 4 exponent bits, with infinities.
    F8E4m3 "float8_e4m3" 8 "V1";
    /// 8-bit float, 3 exponent bits.
    F8E3m4 "float8_e3m4" 8 "V1";
    /// 8-bit power of two.
    F8E8m0fnu "float8_e8m0fnu" 8 "V1";
    /// 4-bit signed integer, one per byte.
    I4 "int4" 8 "V1";
    /// 4-bit unsigned integer, one per byte.
    U4 "uint4" 8 "V1";
    /// 2-bit signed integer, one per byte.
    I2 "int2" 8 "V1";
    /// 2-bit unsigned integer, one per byte.
    U2 "uint2" 8 "V1";
    /// Raw byte of a type that the source does not name (numpy `V1`).
    V1 "V1" 8 "V1";
    /// Raw four bytes of a type that the source does not name (numpy `V4`).
    V4 "V4" 32 "V4";
    /// 4-bit float, two per byte.
    F4E2m1fn "float4_e2m1fn" 4 "u1";
    /// 6-bit float, packed.
    F6E2m3fn "float6_e2m3fn" 6 "u1";
    /// 6-bit float, packed.
    F6E3m2fn "float6_e3m2fn" 6 "u1";
    /// 4-bit signed integer, two per byte, the first in the low half.
    I4Packed "int4_packed" 4 "u1";
    /// 4-bit unsigned integer, two per byte, the first in the low half.
    U4Packed "uint4_packed" 4 "u1";
    /// Blocks of 32 elements in 18 bytes, as GGUF has them.
    Q4_0 "q4_0" 0 "u1";
    /// Blocks of 32 elements in 20 bytes, as GGUF has them.
    Q4_1 "q4_1" 0 "u1";
    /// Blocks of 32 elements in 22 bytes, as GGUF has them.
    Q5_0 "q5_0" 0 "u1";
    /// Blocks of 32 elements in 24 bytes, as GGUF has them.
    Q5_1 "q5_1" 0 "u1";
    /// Blocks of 32 elements in 34 bytes, as GGUF has them.
    Q8_0 "q8_0" 0 "u1";
    /// Blocks of 32 elements in 40 bytes, as GGUF has them.
    Q8_1 "q8_1" 0 "u1";
    /// Blocks of 256 elements in 84 bytes, as GGUF has them.
    Q2K "q2_k" 0 "u1";
    /// Blocks of 256 elements in 110 bytes, as GGUF has them.
    Q3K "q3_k" 0 "u1";
    /// Blocks of 256 elements in 144 bytes, as GGUF has them.
    Q4K "q4_k" 0 "u1";
    /// Blocks of 256 elements in 176 bytes, as GGUF has them.
    Q5K "q5_k" 0 "u1";
    /// Blocks of 256 elements in 210 bytes, as GGUF has them.
    Q6K "q6_k" 0 "u1";
    /// Blocks of 256 elements in 292 bytes, as GGUF has them.
    Q8K "q8_k" 0 "u1";
    /// Blocks of 256 elements in 66 bytes, as GGUF has them.
    Iq2Xxs "iq2_xxs" 0 "u1";
    /// Blocks of 256 elements in 74 bytes, as GGUF has them.
    Iq2Xs "iq2_xs" 0 "u1";
    /// Blocks of 256 elements in 98 bytes, as GGUF has them.
    Iq3Xxs "iq3_xxs" 0 "u1";
    /// Blocks of 256 elements in 50 bytes, as GGUF has them.
    Iq1S "iq1_s" 0 "u1";
    /// Blocks of 32 elements in 18 bytes, as GGUF has them.
    Iq4Nl "iq4_nl" 0 "u1";
    /// Blocks of 256 elements in 110 bytes, as GGUF has them.
    Iq3S "iq3_s" 0 "u1";
    /// Blocks of 256 elements in 82 bytes, as GGUF has them.
    Iq2S "iq2_s" 0 "u1";
    /// Blocks of 256 elements in 136 bytes, as GGUF has them.
    Iq4Xs "iq4_xs" 0 "u1";
    /// Blocks of 256 elements in 56 bytes, as GGUF has them.
    Iq1M "iq1_m" 0 "u1";
    /// Blocks of 256 elements in 54 bytes, as GGUF has them.
    Tq1_0 "tq1_0" 0 "u1";
    /// Blocks of 256 elements in 66 bytes, as GGUF has them.
    Tq2_0 "tq2_0" 0 "u1";
    /// Blocks of 32 elements in 17 bytes, as GGUF has them.
    Mxfp4 "mxfp4" 0 "u1";
    /// Blocks of 64 elements in 36 bytes, as GGUF has them.
    Nvfp4 "nvfp4" 0 "u1";
    /// Blocks of 128 elements in 18 bytes, as GGUF has them.
    Q1_0 "q1_0" 0 "u1";
}

impl Dtype {
    /// The type of this name, if known.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Dtype::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Elements and bytes of one block, of a type whose elements come in blocks.
    pub fn block(self) -> Option<(u64, u64)> {
        Some(match self {
            Dtype::Q4_0 | Dtype::Iq4Nl => (32, 18),
            Dtype::Q4_1 => (32, 20),
            Dtype::Q5_0 => (32, 22),
            Dtype::Q5_1 => (32, 24),
            Dtype::Q8_0 => (32, 34),
            Dtype::Q8_1 => (32, 40),
            Dtype::Q2K => (256, 84),
            Dtype::Q3K | Dtype::Iq3S => (256, 110),
            Dtype::Q4K => (256, 144),
            Dtype::Q5K => (256, 176),
            Dtype::Q6K => (256, 210),
            Dtype::Q8K => (256, 292),
            Dtype::Iq2Xxs | Dtype::Tq2_0 => (256, 66),
            Dtype::Iq2Xs => (256, 74),
            Dtype::Iq3Xxs => (256, 98),
            Dtype::Iq1S => (256, 50),
            Dtype::Iq2S => (256, 82),
            Dtype::Iq4Xs => (256, 136),
            Dtype::Iq1M => (256, 56),
            Dtype::Tq1_0 => (256, 54),
            Dtype::Mxfp4 => (32, 17),
            Dtype::Nvfp4 => (64, 36),
            Dtype::Q1_0 => (128, 18),
            _ => return None,
        })
    }

    /// Several elements share a byte: the `.npy` file holds `|u1` of one
    /// dimension and the logical type and shape stand in the manifest only.
    pub fn is_packed(self) -> bool {
        !self.bits().is_multiple_of(8) || self.block().is_some()
    }

    /// Whether big-endian elements can be described in a `.npy` header.
    pub fn can_be_big_endian(self) -> bool {
        self.bits() > 8 && !self.is_packed() && !self.code().starts_with('V')
    }

    /// The `descr` value of a `.npy` header: `<f4`, `>f4`, `|u1`, `<V2`, ….
    pub fn npy_descr(self, big_endian: bool) -> String {
        let mark = match self {
            Dtype::Bf16 => '<',
            _ if self.bits() <= 8 || self.code().starts_with('V') => '|',
            _ if big_endian => '>',
            _ => '<',
        };
        format!("{mark}{}", self.code())
    }

    /// numpy has no name for it and `ml_dtypes` does, namely this one's.
    pub fn is_of_ml_dtypes(self) -> bool {
        self.code().starts_with('V') && !self.is_packed() && self != Dtype::C32
    }

    /// Bytes of an array of this shape, or `None` when the product overflows or
    /// packed elements do not fill whole bytes.
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        // A zero anywhere makes the array empty, however large the rest is.
        if shape.contains(&0) {
            return Some(0);
        }
        let count = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d))?;
        if let Some((block_len, block_bytes)) = self.block() {
            // Blocks do not go on from one row to the next.
            let row_len = shape.last().copied().unwrap_or(1);
            return match row_len % block_len {
                0 => (count / block_len).checked_mul(block_bytes),
                _ => None,
            };
        }
        let bits = u128::from(count) * u128::from(self.bits());
        if bits % 8 != 0 {
            return None;
        }
        u64::try_from(bits / 8).ok()
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found_again() {
        for &d in Dtype::ALL {
            assert_eq!(Dtype::from_name(d.name()), Some(d));
        }
        assert_eq!(Dtype::from_name("object"), None);
    }

    #[test]
    fn descriptions_are_those_every_numpy_opens() {
        assert_eq!(Dtype::F32.npy_descr(false), "<f4");
        assert_eq!(Dtype::F32.npy_descr(true), ">f4");
        assert_eq!(Dtype::Bool.npy_descr(true), "|b1");
        assert_eq!(Dtype::Bf16.npy_descr(false), "<V2");
        assert_eq!(Dtype::F8E5m2.npy_descr(false), "|V1");
        assert_eq!(Dtype::C32.npy_descr(false), "|V4");
        assert_eq!(Dtype::C128.npy_descr(false), "<c16");
    }

    #[test]
    fn lengths_are_checked() {
        assert_eq!(Dtype::F32.byte_len(&[]), Some(4));
        assert_eq!(Dtype::F32.byte_len(&[0, u64::MAX, u64::MAX]), Some(0));
        assert_eq!(Dtype::F32.byte_len(&[1 << 40, 1 << 40]), None);
        assert_eq!(Dtype::F32.byte_len(&[u64::MAX]), None);
        assert_eq!(Dtype::F4E2m1fn.byte_len(&[3, 2]), Some(3));
        assert_eq!(Dtype::F4E2m1fn.byte_len(&[3]), None);
        assert_eq!(Dtype::F6E2m3fn.byte_len(&[4]), Some(3));
        assert_eq!(Dtype::Q8_0.byte_len(&[4, 64]), Some(4 * 68));
        assert_eq!(Dtype::Q8_0.byte_len(&[64, 4]), None);
        assert_eq!(Dtype::Q6K.byte_len(&[1 << 40, 1 << 40]), None);
        assert_eq!(Dtype::Q6K.byte_len(&[]), None);
        assert!(Dtype::Q6K.is_packed() && Dtype::Q6K.npy_descr(false) == "|u1");
    }
}
